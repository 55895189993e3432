#!/usr/bin/env bash
# Fetch what a bare GPU machine lacks into tests/gpu/wheels (ignored by git; a few MB), for check.sh to install there.
#
#     tests/gpu/wheels.sh [PYTHON_VERSION]      # of that machine, 3.12 by default
set -euo pipefail
cd "$(dirname "$0")"
version=${1:-3.12}
mkdir -p wheels
for name in torchdata jsonargparse docstring-parser typeshed-client lazy-loader importlib-resources gymnasium \
  Farama-Notifications cloudpickle minari diffusers zipp moocore POT pytest-timeout pytest-xdist execnet; do
  "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any \
    -c ../../constraints.txt --dest wheels "$name" || echo "there is no wheel of $name"
done
du -sh wheels
