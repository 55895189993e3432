"""State of optimizers that keeps its dtype."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_methods.optim.foundation.groups import check_own_state


def state_dtype(p: Tensor) -> torch.dtype:
    """Float64 for float64 parameters, float32 for all others."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def load_unrounded_state(optimizer: Optimizer, state_dict: dict[str, Any], known: set[str]) -> None:
    """Load a state; tensors are copied to their parameter's device and keep their dtype.

    ``torch.optim.Optimizer`` casts loaded state to the dtype of the parameter, which would round float32 master state
    of bfloat16 parameters.

    Args:
        optimizer: is about to load.
        state_dict: what it is about to load.
        known: the names that its state of a parameter may hold.

    Raises:
        ValueError: the state is of another kind of optimizer.
    """
    check_own_state(optimizer, state_dict, known)
    Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}})
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, p in zip(keys, params, strict=True):
        if key in state_dict["state"]:
            optimizer.state[p] = {
                name: value.detach().clone().to(p.device) if isinstance(value, Tensor) else value
                for name, value in state_dict["state"][key].items()
            }
