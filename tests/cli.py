"""Run the ``lit-methods`` command in a test."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from lit_methods.cli import main
from tests.new_processes import act_as_torchrun, new_processes


def run_here(monkeypatch: pytest.MonkeyPatch, folder: Path, *args: str) -> None:
    """Run in this process with ``folder`` as the working folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["lit-methods", *args])
    main()


def run_new_process(folder: Path, *args: str, ranks: int = 1) -> str:
    """Run in a new process, or as torchrun does in several, and return what the first printed; fail with all output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        new_processes(_run, ranks, folder, port, ranks, args)
        return (folder / "output0.txt").read_text()
    except Exception as error:
        output = "\n".join(path.read_text() for path in sorted(folder.glob("output*.txt")))
        raise AssertionError(f"lit-methods {' '.join(args)}\n{output}") from error


def _run(rank: int, folder: Path, port: int, ranks: int, args: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    output = os.open(f"output{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if ranks > 1:
        act_as_torchrun(rank, ranks, port)
    sys.argv = ["lit-methods", *args]
    main()
