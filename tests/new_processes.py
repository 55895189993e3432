"""New processes that need not import torch and Lightning first, which takes longer than most of what they do."""

import multiprocessing
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
