"""Regret of online learners, and what its bounds are made of."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_methods.metrics.online_losses import LOSSES, OnlineLoss, minimize_quadratic, minimize_sum, sample_losses

__all__ = ["DynamicRegret", "GradientVariation", "PathLength", "StaticRegret"]


class _Float64Metric(Metric):
    """Keeps float64 states in a module that is moved to another precision, and its states in checkpoints."""

    full_state_update: bool = False
    is_differentiable = False
    higher_is_better = False

    def _zeros(self, name: str, *shape: int, reduce: str = "sum") -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx=reduce, persistent=True)

    def _apply(self, fn: Any, exclude_state: Any = "") -> Any:
        return super()._apply(lambda x: fn(x).double() if x.is_floating_point() else fn(x), exclude_state)


class StaticRegret(_Float64Metric):
    """Total loss minus that of the best fixed point of the ball, which is computed exactly.

    ``linear``, ``quadratic`` and ``least_squares`` keep sufficient statistics, and the best point has a closed form
    (up to the root of a scalar equation); ``logistic``, ``hinge`` and ``abs`` keep all samples, and a Newton method
    finds it (:func:`~lit_methods.metrics.online_losses.minimize_sum`). Over several ranks losses are summed: divide by
    the number of ranks for the regret per round. Everything is float64.

    Args:
        loss: "linear", "quadratic", "least_squares", "logistic", "hinge" or "abs".
        dim: coordinates of the point, >= 1.
        radius: of the ball around the origin, > 0; ``inf`` for no constraint (not with ``linear``).
        **kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> regret = StaticRegret("linear", dim=1, radius=1.0)
        >>> for g in (1.0, 1.0, -1.0):  # a learner that always plays 0
        ...     regret.update(torch.tensor([0.0]), torch.tensor([[g]]), torch.zeros(1))
        >>> regret.compute()
        tensor(1., dtype=torch.float64)
    """

    total: Tensor
    count: Tensor
    linear: Tensor
    quadratic: Tensor
    constant: Tensor
    features: list[Tensor]
    targets: list[Tensor]
    weights: list[Tensor]

    def __init__(self, loss: OnlineLoss, dim: int, radius: float = math.inf, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if dim < 1:
            raise ValueError(f"dim must be >= 1, got {dim}")
        if not radius > 0:
            raise ValueError(f"radius must be > 0, got {radius}")
        if loss == "linear" and math.isinf(radius):
            raise ValueError("radius must be finite for loss='linear', which has no minimum otherwise, got inf")
        self.loss: OnlineLoss = loss
        self.radius = radius
        self.keeps_samples = loss in ("logistic", "hinge", "abs")
        self._zeros("total")
        if self.keeps_samples:
            for name in ("features", "targets", "weights"):
                self.add_state(name, [], dist_reduce_fx="cat", persistent=True)
        else:
            self._zeros("count")
            self._zeros("linear", dim)
            self._zeros("constant")
            if loss == "least_squares":
                self._zeros("quadratic", dim, dim)

    def update(self, losses: Tensor, features: Tensor, targets: Tensor) -> None:
        """Add one round, or several.

        Args:
            losses: of the samples at the point that was played, ``(..., samples)``; a round's loss is their mean.
            features: ``(..., samples, dim)``.
            targets: ``(..., samples)``.
        """
        share = 1 / losses.shape[-1]
        self.total += losses.double().sum() * share
        a, y = features.double().flatten(0, -2), targets.double().flatten()
        if self.keeps_samples:
            for name, value in (("features", a), ("targets", y), ("weights", torch.full_like(y, share))):
                getattr(self, name).append(value)
            return
        self.count += share * len(a)
        if self.loss == "least_squares":
            self.quadratic += share * a.T @ a
            self.linear += share * a.T @ y
            self.constant += 0.5 * share * y.square().sum()
        else:
            self.linear += share * a.sum(0)
            self.constant += 0.5 * share * a.square().sum()

    def best_point(self) -> Tensor:
        """The best fixed point of the rounds so far, ``(dim,)``."""
        if self.keeps_samples:
            return minimize_sum(self.loss, *self._samples(), self.radius)
        if self.loss == "linear":
            return -self.radius * self.linear / self.linear.norm().clamp(min=1e-300)
        if self.loss == "quadratic":
            mean = self.linear / self.count
            return mean * (self.radius / mean.norm()).clamp(max=1)
        return minimize_quadratic(self.quadratic, self.linear, self.radius)

    def compute(self) -> Tensor:
        """The regret of the rounds so far, a float64 scalar."""
        u = self.best_point()
        if self.keeps_samples:
            a, y, w = self._samples()
            return self.total - w @ sample_losses(self.loss, u, a, y)
        if self.loss == "linear":
            return self.total - self.linear @ u
        bend = self.count * u @ u if self.loss == "quadratic" else u @ self.quadratic @ u
        return self.total - (0.5 * bend - self.linear @ u + self.constant)

    def _samples(self) -> tuple[Tensor, Tensor, Tensor]:
        return dim_zero_cat(self.features), dim_zero_cat(self.targets), dim_zero_cat(self.weights)


class DynamicRegret(_Float64Metric):
    """Total loss minus that of a comparator that may move; states are summed over ranks."""

    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._zeros("total")

    def update(self, losses: Tensor, comparator_losses: Tensor) -> None:
        """Add one round: losses of its samples at the played point and at the comparator, ``(samples,)`` each."""
        self.total += losses.double().mean() - comparator_losses.double().mean()

    def compute(self) -> Tensor:
        """The dynamic regret so far."""
        return self.total


class _Differences(_Float64Metric):
    """Sums over successive vectors; the same on all ranks, so ranks are averaged."""

    total: Tensor
    last: Tensor
    rounds: Tensor
    full_state_update = True

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dim < 1:
            raise ValueError(f"dim must be >= 1, got {dim}")
        self._zeros("total", reduce="mean")
        self._zeros("last", dim, reduce="mean")
        self._zeros("rounds", reduce="mean")

    def compute(self) -> Tensor:
        """The sum so far."""
        return self.total


class GradientVariation(_Differences):
    """``sum_t ||g_t - g_{t-1}||^2`` with ``g_0 = 0``: what tunes the optimistic step, and bounds its regret.

    Args:
        dim: coordinates of the gradient, >= 1.
        **kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``dim`` out of range.
    """

    def update(self, gradient: Tensor) -> None:
        """Add one round's gradient, ``(dim,)``: the one that the optimizer sees, averaged over ranks."""
        self.total += (gradient.double() - self.last).square().sum()
        self.last = gradient.detach().double().clone()
        self.rounds += 1


class PathLength(_Differences):
    """``sum_{t >= 2} ||u_t - u_{t-1}||`` of the comparators.

    Args:
        dim: coordinates of a comparator, >= 1.
        **kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``dim`` out of range.
    """

    def update(self, comparator: Tensor) -> None:
        """Add one round's comparator, ``(dim,)``."""
        u = comparator.detach().double()
        self.total += torch.where(self.rounds > 0, (u - self.last).norm(), 0.0)
        self.last = u.clone()
        self.rounds += 1
