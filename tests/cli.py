"""Run the ``lit-methods`` command in a test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_methods.cli import main

ROOT = Path(__file__).parents[1]


def run_here(monkeypatch: pytest.MonkeyPatch, folder: Path, *args: str) -> None:
    """Run in this process with ``folder`` as the working folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["lit-methods", *args])
    main()


def run_new_process(folder: Path, *args: str) -> str:
    """Run in a new process and return what it printed; fail with its output when it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "lit_methods", *args],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert process.returncode == 0, f"lit-methods {' '.join(args)}\n{process.stdout}"
    return process.stdout
