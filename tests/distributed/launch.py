"""Run a function on several real gloo processes."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.new_processes import new_processes


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run module-level ``fn(rank, *args)`` on ``world_size`` processes and return the results in rank order.

    A failure on any rank raises here with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        new_processes(_run_rank, world_size, world_size, folder, fn, args)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _run_rank(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    torch.save(fn(rank, *args), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
