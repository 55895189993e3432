"""Gradient estimators of single random choices (the primitive rules of ADEV, arXiv 2212.06386).

Each pairs a value with a surrogate, a tensor of the same value whose gradient is an unbiased estimate. ``draw`` makes
the choice; ``combine`` turns the value and the surrogate of all that follows into those of the choice as well.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.distributed as dist_
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Uniform,
)

from lit_methods.vi.programmable.tape import Draw, Site, draw_pathwise, draw_plain


class Strategy(ABC):
    """How the gradient passes a random choice; derive from it to add your own.

    A strategy keeps no state: it may serve several sites, and several times.
    """

    uses_score = False
    """Whether ``through`` is a log-probability of which the evaluation keeps the score, summed over particles."""
    has_baseline = False

    @abstractmethod
    def draw(self, dist: Distribution, ctx: Draw) -> tuple[Tensor, Tensor]:
        """The value, of a shape of at least ``ctx.shape`` or with a branch dimension, and what the gradient passes.

        Raises:
            ValueError: the distribution does not suit.
        """

    def combine(self, value: Tensor, surrogate: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Value and surrogate of the cost, before and without this choice's branch dimension."""
        return value, surrogate


class Reparam(Strategy):
    """Differentiate the draw itself: ``x = T(eps; theta)``.

    Noise of normal and uniform distributions is shared by the branches of enumerated choices.
    """

    def draw(self, dist: Distribution, ctx: Draw) -> tuple[Tensor, Tensor]:
        """A differentiable sample."""
        if not dist.has_rsample:
            raise ValueError(
                f"grad of site {ctx.name!r} must not be REPARAM for {type(dist).__name__}, which has no rsample: "
                "use REINFORCE(), ENUM or MVD"
            )
        value = _pathwise(dist, ctx.shape)
        return value, value


class Reinforce(Strategy):
    """The score function: ``grad f + (f - b) grad log q(x)``.

    Args:
        baseline: ``b``, which must not depend on the choice: ``None``, a number, a tensor (used without its gradient),
            ``"leave_one_out"`` (the mean of the other samples' costs; needs ``num_samples >= 2``), or a module:
            :class:`MovingAverage`, or a network of ``inputs`` with one output per problem, which learns to predict the
            cost by least squares. The network's loss sends no gradient to ``inputs``.
        inputs: what the baseline network is called with.

    Raises:
        ValueError: ``baseline`` is none of these, or not finite; while drawing: its shape is not that of the problems.
    """

    uses_score = True

    def __init__(
        self,
        baseline: Literal["leave_one_out"] | float | Tensor | nn.Module | None = None,
        inputs: tuple[Tensor, ...] = (),
    ) -> None:
        if isinstance(baseline, str) and baseline != "leave_one_out":
            raise ValueError(f"baseline must be 'leave_one_out', a number, a tensor or a module, got {baseline!r}")
        if isinstance(baseline, float | int) and not math.isfinite(baseline):
            raise ValueError(f"baseline must be finite, got {baseline}")
        self.baseline = baseline
        self.inputs = inputs
        self.has_baseline = baseline is not None

    def draw(self, dist: Distribution, ctx: Draw) -> tuple[Tensor, Tensor]:
        """A sample, and its log-probability."""
        value = draw_plain(dist, ctx.shape)
        if isinstance(self.baseline, nn.Module):
            inputs = [x.detach() for x in self.inputs]
            ctx.memory = self.baseline(*inputs)
            ctx.baseline = ctx.memory.detach()
        elif self.baseline is not None and self.baseline != "leave_one_out":
            ctx.baseline = self.baseline.detach() if isinstance(self.baseline, Tensor) else self.baseline
        if isinstance(ctx.baseline, Tensor) and ctx.baseline.ndim:
            batch, full = ctx.tape.batch, ctx.tape.shape
            shape = tuple(ctx.baseline.shape)
            if shape[len(shape) - len(batch) :] != batch or not fits(shape, full):
                raise ValueError(f"baseline of site {ctx.name!r} must have the shape {list(batch)}, got {list(shape)}")
        return value, log_prob(dist, value)

    def combine(self, value: Tensor, surrogate: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Add ``(value - b) * score`` to the surrogate."""
        tape = site.tape
        if isinstance(self.baseline, nn.Module):
            target = value.detach()
            if isinstance(self.baseline, MovingAverage):
                tape.after.append(lambda: self.baseline.move(target))  # type: ignore[union-attr,operator]
            else:
                tape.baseline_losses.append((site.memory - target).square().mean())
        signal = value - _mean_of_others(value, site) if self._leaves_out else value
        assert site.score is not None
        return value, surrogate + (signal * site.score - site.control)

    @property
    def _leaves_out(self) -> bool:
        return isinstance(self.baseline, str)


def _mean_of_others(value: Tensor, site: Site) -> Tensor:
    base, batch_ndim = site.tape.base, site.tape.batch_ndim
    if len(base) == batch_ndim:
        raise ValueError(f"num_samples must be >= 2 for the leave_one_out baseline of site {site.name!r}, got 1")
    value = value.expand(torch.broadcast_shapes(value.shape, base))
    return (value.sum(-(batch_ndim + 1), keepdim=True) - value) / (base[0] - 1)


class MovingAverage(nn.Module):
    """A baseline: the exponential moving average of the mean cost. A buffer, averaged over data-parallel ranks.

    Args:
        decay: share of the past, in [0, 1).
    """

    average: Tensor
    started: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self) -> Tensor:
        """The average so far; 0 at first."""
        return self.average

    @torch.no_grad()
    def move(self, cost: Tensor) -> None:
        """Take the mean of a cost into the average; in training mode only."""
        if not self.training:
            return
        mean = cost.mean().to(self.average)
        if dist_.is_available() and dist_.is_initialized():
            dist_.all_reduce(mean)
            mean /= dist_.get_world_size()
        moved = torch.where(self.started, self.average + (1 - self.decay) * (mean - self.average), mean)
        self.average, self.started = moved, torch.ones_like(self.started)


class Enumerate(Strategy):
    """Sum over the support, exactly: ``sum_k p_k f(k)``. All that follows is evaluated for every k."""

    def draw(self, dist: Distribution, ctx: Draw) -> tuple[Tensor, Tensor]:
        """All values of the support, on a branch dimension, and their probabilities."""
        rows = support(dist, ctx.name)
        value = ctx.branch(rows.reshape(len(rows), *dist.event_shape), len(dist.event_shape))
        return value, log_prob(dist, value).exp()

    def combine(self, value: Tensor, surrogate: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """The expectation over the branch dimension."""
        p = site.through
        impossible = (p.detach() == 0) & ~torch.isfinite(value)  # 0 * inf is 0 here
        return _expectation(p.detach(), value, impossible, site.dim), _expectation(p, surrogate, impossible, site.dim)


def _expectation(p: Tensor, cost: Tensor, impossible: Tensor, dim: int | None) -> Tensor:
    if cost.ndim != dim:
        return cost  # does not depend on the choice
    if len(cost) == 1:
        return cost[0]
    return (p * torch.where(impossible, 0.0, cost)).sum(0)


class MeasureValued(Strategy):
    """The measure-valued derivative of a Bernoulli choice: ``d/dp E f = f(1) - f(0)``.

    Samples b, and evaluates what follows for ``1 - b`` too. m such choices in a row cost ``2^m`` evaluations (ADEV's
    rule, which does not nest the other branch: m + 1): fit for m <= 4.
    """

    def draw(self, dist: Distribution, ctx: Draw) -> tuple[Tensor, Tensor]:
        """The sample and its opposite, on a branch dimension, and the probability of 1."""
        if not isinstance(dist, Bernoulli):
            raise ValueError(
                f"grad of site {ctx.name!r} must not be MVD for {type(dist).__name__}: MVD is for Bernoulli"
            )
        value = draw_plain(dist, ctx.shape)
        ctx.memory = 2 * value - 1
        return ctx.branch(torch.stack([value, 1 - value]), 0), dist.probs

    def combine(self, value: Tensor, surrogate: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """The sampled branch, plus the difference of branches times the gradient of p."""
        if surrogate.ndim == site.dim:
            surrogate = surrogate[0]
        if value.ndim != site.dim:
            return value, surrogate
        if len(value) == 2:
            p = site.through
            surrogate = surrogate + site.memory * (value[0] - value[1]) * (p - p.detach())
        return value[0], surrogate


REPARAM = Reparam()
REINFORCE = Reinforce
ENUM = Enumerate()
MVD = MeasureValued()


def resolve(grad: Strategy | type[Strategy] | str, dist: Distribution, name: str) -> Strategy:
    """The strategy that ``grad`` means for a distribution."""
    if isinstance(grad, Strategy):
        return grad
    if grad is REINFORCE:
        return Reinforce()
    if grad == "auto":
        return REPARAM if dist.has_rsample else _PLAIN_REINFORCE
    raise ValueError(
        f"grad of site {name!r} must be 'auto', REPARAM, REINFORCE(...), ENUM, MVD or a Strategy, got {grad!r}"
    )


_PLAIN_REINFORCE = Reinforce()


def log_prob(dist: Distribution, value: Tensor) -> Tensor:
    """Log-probability of what was drawn from ``dist``, which need not be validated."""
    validates, dist._validate_args = dist._validate_args, False
    try:
        return dist.log_prob(value)
    finally:
        dist._validate_args = validates


def support(dist: Distribution, name: str) -> Tensor:
    """All values of a distribution, ``(values, 1, ..., *event)``."""
    if not isinstance(dist, Bernoulli | Categorical | OneHotCategorical):
        try:
            rows = dist.enumerate_support(expand=False) if not dist.event_shape else None
        except NotImplementedError:
            rows = None
        if rows is None:
            raise ValueError(
                f"grad of site {name!r} must not be ENUM for {type(dist).__name__}, whose support cannot be listed: "
                "use REINFORCE()"
            )
        return rows
    return dist.enumerate_support(expand=False)


def _pathwise(dist: Distribution, shape: tuple[int, ...]) -> Tensor:
    """``rsample``, with noise of ``shape`` where the distribution has more dimensions: its branches share it."""
    if isinstance(dist, Independent):
        inner = shape + tuple(dist.event_shape[: dist.reinterpreted_batch_ndims])
        if len(dist.base_dist.event_shape) == 0:
            return _pathwise(dist.base_dist, inner)
    elif type(dist) is Normal:
        return dist.loc + dist.scale * torch.randn(shape, dtype=dist.loc.dtype, device=dist.loc.device)
    elif type(dist) is Uniform:
        noise = torch.rand(shape, dtype=dist.low.dtype, device=dist.low.device)
        return dist.low + (dist.high - dist.low) * noise
    elif type(dist) is MultivariateNormal:
        noise = torch.randn(*shape, *dist.event_shape, dtype=dist.loc.dtype, device=dist.loc.device)
        return dist.loc + (dist._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    return draw_pathwise(dist, shape)


def fits(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether ``shape`` broadcasts to ``full`` without growing it."""
    left = len(full) - len(shape)
    return left >= 0 and all(a in (1, b) for a, b in zip(shape, full[left:], strict=True))
