#!/usr/bin/env bash
# Everything that a GPU can tell of this library, in one command and under eight minutes:
#
#     tests/gpu/check.sh [--dry-run] [FOLDER]
#
# Runs the tests marked gpu, then the measurements, and leaves tests.txt, gpu.json and gpu.md in FOLDER (else $OUT, else
# gpu_report). Packages that are missing are taken from tests/gpu/wheels, which wheels.sh fills beforehand; none is
# downloaded. Without CUDA it says so and ends well. --dry-run goes the same way on the CPU with tiny sizes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
selection=""
if [[ "${1:-}" == --dry-run ]]; then
  shift
  export LIT_METHODS_GPU_DRY_RUN=1
  selection="ScaledGD or (test_forward and SymmetricSensing) or matrix_sensing"
fi
out=$(realpath -m "${1:-${OUT:-gpu_report}}")
mkdir -p "$out"

if [[ -z "${LIT_METHODS_GPU_DRY_RUN:-}" ]] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "tests/gpu/check.sh: torch sees no CUDA device, so there is nothing to check"
  exit 0
fi

packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
for wheel in tests/gpu/wheels/*.whl; do
  [[ -e "$wheel" ]] || continue
  name=$(basename "$wheel" | cut -d- -f1)
  "$python" -c "import importlib.metadata, sys; importlib.metadata.version(sys.argv[1])" "$name" 2> "$packages/log" && continue
  "$python" -m pip install --quiet --no-index --no-deps --target "$packages" "$wheel" 2> "$packages/log" \
    || echo "cannot be installed here, and is left out: $(basename "$wheel")"
done
export PYTHONPATH="$PWD:$packages${PYTHONPATH:+:$PYTHONPATH}"
"$python" - <<'PY'
import importlib.util
needed = ("torchdata", "jsonargparse", "lazy_loader", "diffusers", "gymnasium", "mujoco", "minari", "moocore", "peft", "ot")
print("missing, so what needs them is skipped:", ", ".join(n for n in needed if not importlib.util.find_spec(n)) or "nothing")
PY

mapfile -t tests < <(grep -rlE "mark\.gpu|ON_GPU" tests --include="test_*.py")
status=0
"$python" -m pytest -m gpu -q -rfs -p no:cacheprovider ${selection:+-k "$selection"} "${tests[@]}" > "$out/tests.txt" 2>&1 || status=$?
tail -n 3 "$out/tests.txt"
"$python" -m tests.gpu.measure "$out" || status=$?
cat "$out/gpu.md"
exit "$status"
