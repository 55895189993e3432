"""Rules for SSO's step size η in the space of the targets, and the metric of its distance there."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_methods.optim.foundation.groups import check_at_least, check_factor, check_positive, check_share
from lit_methods.optim.sso.targets import Targets, add_squared_slopes

__all__ = ["AdaGrad", "AdaGradPerExample", "Armijo", "Constant", "Exponential", "Newton", "Sqrt", "StepRule"]

LossAt = Callable[[list[Tensor]], Tensor]
Metric = list[Tensor] | None


class StepRule(ABC):
    """How long a step in the space of the targets is; abstract."""

    euclidean_only: bool = False  # whether it needs the squared distance

    @abstractmethod
    def step_size(
        self, targets: Targets, loss: Tensor | None, loss_at: LossAt, lr: float, state: dict[str, Any]
    ) -> tuple[float, Metric]:
        """η and the metric of this step; ``state`` is SSO's, whose ``step`` counts from 1, and keeps what lasts."""


@dataclass(frozen=True)
class Constant(StepRule):
    """η = lr. With 1/L of the loss, or below, the loss never grows on a full batch."""

    def step_size(
        self, targets: Targets, loss: Tensor | None, loss_at: LossAt, lr: float, state: dict[str, Any]
    ) -> tuple[float, Metric]:
        """See the class."""
        return lr, targets.mask


@dataclass(frozen=True)
class Sqrt(StepRule):
    """η = lr / √t at step t = 1, 2, ..., for stochastic losses."""

    def step_size(
        self, targets: Targets, loss: Tensor | None, loss_at: LossAt, lr: float, state: dict[str, Any]
    ) -> tuple[float, Metric]:
        """See the class."""
        return lr / math.sqrt(state["step"]), targets.mask


@dataclass(frozen=True)
class Exponential(StepRule):
    """η = lr (1/T)^(t/T) at step t = 1, 2, ...; whether the authors count from 0 is not verified.

    Args:
        total_steps: T, >= 1.

    Raises:
        ValueError: ``total_steps`` is below 1.
    """

    total_steps: int

    def __post_init__(self) -> None:
        check_at_least(1, total_steps=self.total_steps)

    def step_size(
        self, targets: Targets, loss: Tensor | None, loss_at: LossAt, lr: float, state: dict[str, Any]
    ) -> tuple[float, Metric]:
        """See the class."""
        return lr * (1 / self.total_steps) ** (state["step"] / self.total_steps), targets.mask


@dataclass(frozen=True)
class Armijo(StepRule):
    """The first η, falling from ``grow`` times the last one (at first lr), with l(z - ηg) <= l(z) - c η |g|².

    It finds η by itself at the price of loss evaluations.

    Args:
        c: demanded share of the linear decrease, in (0, 1).
        decay: factor of η after a rejected trial, in (0, 1).
        grow: factor of η before each step, >= 1.
        bounds: the least and greatest η.
        loss_fn: the loss as a function of the targets, for capture mode with one call of the module in a step; a
            target closure brings its own.

    Raises:
        ValueError: an argument out of range.
    """

    c: float = 0.5
    decay: float = 0.9
    grow: float = 2.0
    bounds: tuple[float, float] = (1e-4, 1e4)
    loss_fn: Callable[[Tensor], Tensor] | None = None

    euclidean_only = True
    _trials = 100

    def __post_init__(self) -> None:
        check_share(c=self.c, decay=self.decay)
        check_factor(grow=self.grow)
        _check_bounds(self.bounds)

    def step_size(
        self, targets: Targets, loss: Tensor | None, loss_at: LossAt, lr: float, state: dict[str, Any]
    ) -> tuple[float, Metric]:
        """See the class."""
        assert loss is not None
        value, slope = targets.mean_loss(loss), targets.squared_norm / targets.total
        least, greatest = self.bounds
        eta = min(max(self.grow * state.get("eta", lr), least), greatest)
        for _ in range(self._trials):
            points = [z - eta * targets.count * s for z, s in zip(targets.z, targets.slopes, strict=True)]
            if targets.mean_loss(loss_at(points)) <= value - self.c * eta * slope or eta <= least:
                break
            eta = max(self.decay * eta, least)
        return eta, targets.mask


@dataclass(frozen=True)
class AdaGrad(StepRule):
    """η = lr / √Σ_s |g_s|², the sum over all steps, batches and outputs."""

    def step_size(
        self, targets: Targets, loss: Tensor | None, loss_at: LossAt, lr: float, state: dict[str, Any]
    ) -> tuple[float, Metric]:
        """See the class."""
        state["sum"] = state.get("sum", 0.0) + targets.squared_norm
        return 1 / (math.sqrt(state["sum"]) / lr + 1e-6), targets.mask


@dataclass(frozen=True)
class AdaGradPerExample(StepRule):
    """η = lr in the metric √G, for a table G of summed squared gradients of each example and output.

    The closure must return (targets, loss_fn, indices).

    Args:
        bounds: the least and greatest entry of the table when it is used.

    Raises:
        ValueError: ``bounds`` are not 0 < least <= greatest.
    """

    bounds: tuple[float, float] = (1e-5, 1e5)

    euclidean_only = True

    def __post_init__(self) -> None:
        _check_bounds(self.bounds)

    def step_size(
        self, targets: Targets, loss: Tensor | None, loss_at: LossAt, lr: float, state: dict[str, Any]
    ) -> tuple[float, Metric]:
        """See the class."""
        state["table"], rows = add_squared_slopes(state.get("table"), targets)
        return lr, targets.masked([rows.clamp(*self.bounds).sqrt()])


@dataclass(frozen=True)
class Newton(StepRule):
    """η = lr in the metric p(1-p) + damping, the logistic loss's second derivative at z; needs ``loss="bce"``.

    Args:
        damping: > 0.

    Raises:
        ValueError: ``damping`` is not > 0.
    """

    damping: float = 1e-5

    euclidean_only = True

    def __post_init__(self) -> None:
        check_positive(damping=self.damping)

    def step_size(
        self, targets: Targets, loss: Tensor | None, loss_at: LossAt, lr: float, state: dict[str, Any]
    ) -> tuple[float, Metric]:
        """See the class."""
        probabilities = [z.sigmoid() for z in targets.z]
        return lr, targets.masked([p * (1 - p) + self.damping for p in probabilities])


def _check_bounds(bounds: tuple[float, float]) -> None:
    if not 0 < bounds[0] <= bounds[1] < math.inf:
        raise ValueError(f"bounds must be 0 < least <= greatest, and finite, got {bounds}")


_SHORTHANDS: dict[str, StepRule] = {
    "constant": Constant(),
    "sqrt": Sqrt(),
    "armijo": Armijo(),
    "adagrad": AdaGrad(),
    "adagrad_per_example": AdaGradPerExample(),
    "newton": Newton(),
}


def step_rule(rule: str | StepRule) -> StepRule:
    """The rule that ``rule`` names, or is."""
    if isinstance(rule, StepRule):
        return rule
    if rule == "exponential":
        raise ValueError("rule='exponential' lacks the number of steps: pass rule=Exponential(total_steps=...)")
    if rule not in _SHORTHANDS:
        raise ValueError(f"rule must be one of {', '.join(map(repr, _SHORTHANDS))}, or a StepRule, got {rule!r}")
    return _SHORTHANDS[rule]
