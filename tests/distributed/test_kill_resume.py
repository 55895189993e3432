"""Training is killed with SIGKILL in the middle of an epoch and resumed in new processes, bit for bit."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.compare import assert_same
from tests.distributed.resume_job import EPOCHS, SAVE_EVERY, STEPS_PER_EPOCH

ROOT = Path(__file__).parents[2]


def start(folder: Path, ranks: int, *options: object) -> list[int]:
    """Run the job with one process per rank; returns the exit codes."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "tests.distributed.resume_job",
        str(folder),
        f"--ranks={ranks}",
        *map(str, options),
    ]
    jobs = []
    for rank in range(ranks):
        with (folder / f"output{rank}.txt").open("a") as output:
            rank_environment = {**environment, "LOCAL_RANK": str(rank)} if ranks > 1 else environment
            jobs.append(
                subprocess.Popen(command, cwd=ROOT, env=rank_environment, stdout=output, stderr=subprocess.STDOUT)
            )
    try:
        return [job.wait(timeout=240) for job in jobs]
    finally:
        for job in jobs:
            job.kill()


def steps(folder: Path, rank: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]


# The contract suite kills every module on one rank.
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_run_ends_like_the_uninterrupted_one(tmp_path, ranks):
    """The data order does not depend on the workers, so one uninterrupted run serves for both."""
    whole = tmp_path / "whole"
    kill_at = STEPS_PER_EPOCH + SAVE_EVERY + 2  # in the second epoch, two steps after a checkpoint
    assert start(whole, ranks) == [0] * ranks
    for rank in range(ranks):
        assert [step["step"] for step in steps(whole, rank)] == list(range(EPOCHS * STEPS_PER_EPOCH))
        assert len({step["data"] for step in steps(whole, rank)}) == EPOCHS * STEPS_PER_EPOCH  # epochs differ
    if ranks > 1:
        assert {step["data"] for step in steps(whole, 0)}.isdisjoint(step["data"] for step in steps(whole, 1))

    for workers in (0, 2):
        killed, resumed = (tmp_path / f"{name}{workers}" for name in ("killed", "resumed"))
        codes = start(killed, ranks, f"--workers={workers}", f"--kill_at={kill_at}")
        assert -signal.SIGKILL in codes
        assert 0 not in codes
        assert start(resumed, ranks, f"--workers={workers}", f"--resume={killed / 'last.ckpt'}") == [0] * ranks
        for rank in range(ranks):
            assert steps(killed, rank) == steps(whole, rank)[:kill_at]
            assert steps(resumed, rank) == steps(whole, rank)[kill_at - 2 :]
        final, expected = (torch.load(folder / "final.ckpt", weights_only=True) for folder in (resumed, whole))
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_same(final[part], expected[part], part)
