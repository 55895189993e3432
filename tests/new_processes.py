"""New processes that need not import torch and Lightning first, which takes longer than most of what they do."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

# They are forked from a server process, one per test process, that has imported these and done nothing else.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["lit_methods.cli", "lit_methods.optim", "lightning.pytorch", "torch._dynamo", "torch.distributed.fsdp"]
)


def new_processes(fn: Callable[..., Any], number: int, *args: Any) -> None:
    """Run module-level ``fn(index, *args)`` in each; raises with the first failing one's traceback."""
    torch.multiprocessing.start_processes(fn, args, nprocs=number, start_method="forkserver")


def act_as_torchrun(rank: int, ranks: int, port: int = 0) -> None:
    """Make Lightning join the processes that are there instead of starting its own.

    Args:
        rank: of this process.
        ranks: number of processes.
        port: where they meet; needed unless the process group is initialized.
    """
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
