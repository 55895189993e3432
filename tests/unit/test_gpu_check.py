"""The command for machines with a GPU takes its way to the end; here on the CPU, with tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.contract.pieces import ROOT
from tests.gpu.measure import MEASUREMENTS


def check(*arguments: str, **environment: str) -> str:
    command = [str(ROOT / "tests" / "gpu" / "check.sh"), *arguments]
    env = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def test_dry_run(tmp_path: Path) -> None:
    output = check("--dry-run", str(tmp_path))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["dry_run"]
    assert [row for row in found["rows"] if "error" in row] == []
    assert len({row["method"] for row in found["rows"]}) >= len(MEASUREMENTS)
    assert "| Nash Prox step |" in output
    assert " passed" in (tmp_path / "tests.txt").read_text().splitlines()[-1]


def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    assert "no CUDA device" in check(str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert not list(tmp_path.iterdir())
