"""What optimizers check of the settings and gradients of their parameter groups, in the same words."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def check_lr(lr: Any) -> None:
    """Raise unless ``lr`` is a finite number >= 0; a tensor, which would have to be read at each step, is refused."""
    if isinstance(lr, Tensor):
        raise ValueError(f"lr must be a number, not a tensor, got {lr}; pass lr=float(lr)")
    check_nonnegative(lr=lr)


def check_positive(**values: Any) -> None:
    """Raise unless each value is a finite number > 0; None passes."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def check_nonnegative(**values: Any) -> None:
    """Raise unless each value is a finite number >= 0; None passes."""
    for name, value in values.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def check_at_least(least: int, **values: int | None) -> None:
    """Raise unless each value is an integer >= ``least``; None passes."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_fractions(**values: float | None) -> None:
    """Raise unless each value is in [0, 1); None passes."""
    for name, value in values.items():
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_share(**values: float) -> None:
    """Raise unless each value is in (0, 1)."""
    for name, value in values.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), got {value}")


def check_factor(**values: float) -> None:
    """Raise unless each value is a finite number >= 1."""
    for name, value in values.items():
        if not 1 <= value < math.inf:
            raise ValueError(f"{name} must be >= 1 and finite, got {value}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_keys(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse settings that a parameter group cannot have of its own."""
    for key in group.keys() - defaults.keys() - {"params", "param_names"}:
        raise ValueError(
            f"{key} is no setting of a parameter group, got {group[key]!r}; groups have {sorted(defaults)}"
        )


def check_shared(group: dict[str, Any], defaults: dict[str, Any], keys: Sequence[str]) -> None:
    """Refuse a group whose value of one of ``keys``, which all groups share, is another one."""
    for key in keys:
        value = group.get(key, defaults[key])
        if value is not defaults[key] and value != defaults[key]:
            raise ValueError(f"{key} is shared by all parameter groups, got {group[key]!r} for one of them")


def check_real(params: Sequence[Tensor]) -> None:
    """Refuse parameters that are not real floating point."""
    for p in params:
        if not p.is_floating_point():
            raise ValueError(f"params must be real floating point, got {p.dtype}; view complex ones as real")


def check_own_state(optimizer: Optimizer, state_dict: dict[str, Any], known: set[str]) -> None:
    """Refuse a state that another kind of optimizer saved; torch would keep what it does not know, silently.

    Args:
        optimizer: is about to load.
        state_dict: what it is about to load.
        known: the names that its state of a parameter, or of all parameters together, may hold.
    """
    of_schedulers = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
    foreign = set().union(*state_dict["param_groups"]) - of_schedulers.union(*optimizer.param_groups)
    foreign |= set().union(*state_dict["state"].values()) - known
    if foreign:
        name = type(optimizer).__name__
        raise ValueError(f"the state is not of {name}, which does not know {', '.join(map(repr, sorted(foreign)))}")


def check_gradients(params: Sequence[Tensor], name: str) -> None:
    """Refuse sparse gradients in the name of the optimizer."""
    if any(p.grad is not None and p.grad.layout is not torch.strided for p in params):
        raise RuntimeError(f"{name} does not support sparse gradients; build the embedding with sparse=False")


def count_round(state: dict[Any, dict[str, Any]], group: dict[str, Any], params: Sequence[Tensor]) -> int:
    """Count one more round of the group, in the state of ``params``, which take part in it; the number from 1."""
    number = rounds_so_far(state, group) + 1
    for p in params:
        state[p]["rounds"] = number
    return number


def rounds_so_far(state: dict[Any, dict[str, Any]], group: dict[str, Any]) -> int:
    """Rounds of the group: of the parameter that has seen the most."""
    return max((state[p].get("rounds", 0) for p in group["params"] if p in state), default=0)
