"""NashMP on real processes: killed and resumed to the bit, and on two ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.compare import assert_same
from tests.distributed.nash_mp_job import SAVE_EVERY, STEPS

ROOT = Path(__file__).parents[2]


def start(folder: Path, ranks: int, *options: object) -> list[int]:
    """Run the job with one process per rank; returns the exit codes."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.distributed.nash_mp_job", str(folder), f"--ranks={ranks}"]
    jobs = []
    for rank in range(ranks):
        with (folder / f"output{rank}.txt").open("a") as output:
            rank_environment = {**environment, "LOCAL_RANK": str(rank)} if ranks > 1 else environment
            arguments = [*command, *map(str, options)]
            jobs.append(
                subprocess.Popen(arguments, cwd=ROOT, env=rank_environment, stdout=output, stderr=subprocess.STDOUT)
            )
    try:
        return [job.wait(timeout=280) for job in jobs]
    finally:
        for job in jobs:
            job.kill()


def steps(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]


@pytest.mark.slow  # test_kill_resume kills by default, and the contract suite resumes NashMP
@pytest.mark.parametrize(("ranks", "options"), [(1, ["--mode=mirror_prox"]), (2, ["--full"])])
def test_killed_run_ends_like_the_uninterrupted_one(tmp_path: Path, ranks: int, options: list[str]) -> None:
    whole, killed, resumed = (tmp_path / name for name in ("whole", "killed", "resumed"))
    kill_at = 2 * SAVE_EVERY + 1  # one step after a checkpoint
    assert start(whole, ranks, *options) == [0] * ranks, (whole / "output0.txt").read_text()
    codes = start(killed, ranks, *options, f"--kill_at={kill_at}")
    assert -signal.SIGKILL in codes
    assert start(resumed, ranks, *options, f"--resume={killed / 'last.ckpt'}") == [0] * ranks
    for rank in range(ranks):
        assert len(steps(whole, rank)) == STEPS
        assert steps(killed, rank) == steps(whole, rank)[:kill_at]
        assert steps(resumed, rank) == steps(whole, rank)[kill_at - 1 :]
    final, expected = (torch.load(folder / "final.ckpt", weights_only=True) for folder in (resumed, whole))
    for part in ("state_dict", "optimizer_states", "nash_mp"):
        assert_same(final[part], expected[part], part)
    if ranks == 2:
        check_ranks(*(steps(whole, rank) for rank in range(2)))


def check_ranks(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    """Ranks see other prompts, draw other responses, and keep the same weights and metrics."""
    for one, other in zip(first, second, strict=True):
        assert set(one["rows"]).isdisjoint(other["rows"])
        assert one["draws"] != other["draws"]
        assert (one["policy"], one["target"]) == (other["policy"], other["target"])
        assert one["val"] == other["val"]
    assert len({step["policy"] for step in first}) == STEPS
    assert 0 < first[-1]["val"]["val/win_rate/reference"] < 1


@pytest.mark.parametrize("settings", [["--saving"], pytest.param([], marks=pytest.mark.slow)])
def test_sharded_weights_take_the_same_steps_as_ddp(tmp_path: Path, settings: list[str]) -> None:
    """FSDP2 on two gloo ranks, against DDP: other order of sums, same draws. SGD, since Adam makes noise into steps."""
    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp"
    options = ["--full", "--no-warmup", "--sgd", *settings]
    assert start(ddp, 2, *options) == [0, 0], (ddp / "output0.txt").read_text()
    assert start(fsdp, 2, *options, "--sharded") == [0, 0], (fsdp / "output0.txt").read_text()
    for rank in range(2):
        assert len(steps(fsdp, rank)) == STEPS
        for one, other in zip(steps(ddp, rank), steps(fsdp, rank), strict=True):
            assert one["draws"] == other["draws"]
            for name in ("policy", "target"):
                assert float.fromhex(one[name]) == pytest.approx(float.fromhex(other[name]), rel=1e-5)


@pytest.mark.slow
def test_sharded_weights_in_mixed_precision(tmp_path: Path) -> None:
    options = ["--full", "--no-warmup", "--saving", "--sharded", "--precision=bf16-mixed"]
    assert start(tmp_path, 2, *options) == [0, 0], (tmp_path / "output0.txt").read_text()
    check_ranks(*(steps(tmp_path, rank) for rank in range(2)))
