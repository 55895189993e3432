"""The house's rule for a loss or gradient that is not finite: the step is not taken, and the first such step warns."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lit_methods.optim.foundation.flat import local_grad, sum_over_shards


def gradients_are_finite(params: Sequence[Any]) -> bool:
    """Whether the gradients are finite and the square of their norm does not overflow, alike on all ranks.

    One host synchronisation. Parameters without a gradient pass.
    """
    params = [p for p in params if p.grad is not None]
    if not params:
        return True
    grads = [local_grad(p) for p in params]
    dtype = torch.float32
    for each in {grad.dtype for grad in grads}:
        dtype = torch.promote_types(dtype, each)
    return math.isfinite(sum_over_shards(torch._foreach_norm(grads, 2, dtype), params).item())


def warn_of_skipped_step(optimizer: Optimizer, reason: str = "the loss or its gradient is not finite") -> None:
    """Say, once for every optimizer, that it skips steps."""
    if getattr(optimizer, "_has_warned_of_skips", False):
        return
    optimizer._has_warned_of_skips = True  # type: ignore[attr-defined]
    name = type(optimizer).__name__
    warnings.warn(f"{name} skipped a step: {reason}; it will skip others like it without saying so", RuntimeWarning)
