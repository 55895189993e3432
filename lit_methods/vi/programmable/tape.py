"""What one evaluation of an objective remembers: its dimensions, and its random choices with their estimators.

Every tensor of an evaluation has the shape ``(..., samples, *batch)`` before its event dimensions. Dimensions that come
into being during the evaluation, particles and branches of enumerated choices, are added on the left, each with a place
of its own, so that ordinary broadcasting does the rest.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution

if TYPE_CHECKING:
    from lit_methods.vi.programmable.strategies import Strategy


class Unroll(Exception):
    """A choice that branches stands under a dimension of particles: run them one after the other."""


@dataclass
class Site:
    """One random choice of an evaluation, as its strategy's ``combine`` sees it.

    Attributes:
        name: of the choice.
        strategy: its gradient estimator.
        tape: the evaluation.
        through: what the gradient of the choice passes through: the value (REPARAM), the log-probability of the value
            (REINFORCE) or the probabilities (ENUM, MVD).
        dim: place of its branch dimension, counted from the right without event dimensions; ``None`` without one.
        score: ``log q - stop(log q)``, summed over particles; a number 0 with a gradient. Only for ``uses_score``.
        control: baseline times score, summed over particles.
        memory: whatever else the strategy wants to keep.
    """

    name: str
    strategy: "Strategy"
    tape: "Tape"
    through: Tensor
    dim: int | None = None
    score: Tensor | None = None
    control: Tensor | float = 0.0
    memory: Any = None


@dataclass
class Scored:
    """One term of a log-density, kept to say in an error which site it was."""

    name: str
    log_prob: Tensor


class Tape:
    """The dimensions and sites of one evaluation.

    Args:
        base: sizes ``(samples, *batch)``, or ``batch`` alone for one sample.
        batch_ndim: how many of them are the batch's.
        plain: draw every choice without regard to gradients, and remember none.
        max_branches: largest product of branches.
        override: maps (name, distribution, strategy) to the strategy that is used instead.
    """

    def __init__(
        self,
        base: tuple[int, ...] = (),
        batch_ndim: int = 0,
        plain: bool = False,
        max_branches: int = 4096,
        override: "Callable[[str, Distribution, Strategy], Strategy] | None" = None,
    ) -> None:
        self.base = base
        self.batch_ndim = batch_ndim
        self.plain = plain
        self.max_branches = max_branches
        self.override = override
        self.sites: list[Site] = []
        self.scored: list[Scored] = []
        self.after: list[Callable[[], None]] = []  # what to do once the estimate is made, such as moving an average
        self.baseline_losses: list[Tensor] = []
        self._extra: list[tuple[int, bool]] = []  # (size, whether a branch), from the right
        self._particle_dims = 0
        self._set_shapes()

    def _set_shapes(self) -> None:
        sizes = [size for size, _ in reversed(self._extra)]
        self.shape: tuple[int, ...] = (*sizes, *self.base)
        noise = [1 if branch else size for size, branch in reversed(self._extra)]
        while noise and noise[0] == 1:
            noise.pop(0)
        self.draw_shape: tuple[int, ...] = (*noise, *self.base)

    @property
    def ndim(self) -> int:
        """How many dimensions there are now."""
        return len(self.shape)

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch dimensions."""
        return self.base[len(self.base) - self.batch_ndim :]

    def draw(self, name: str, dist: Distribution, strategy: "Strategy") -> Tensor:
        """Draw from ``dist`` as ``strategy`` wants it, and remember the site."""
        if self.plain and self.override is None:
            with torch.no_grad():
                return draw_plain(dist, self.draw_shape)
        if self.override is not None:
            strategy = self.override(name, dist, strategy)
        draw = Draw(name, self)
        value, through = strategy.draw(dist, draw)
        site = Site(name, strategy, self, through, draw.dim, memory=draw.memory)
        if strategy.uses_score:
            site.score = through - through.detach()
            if draw.baseline is not None:
                site.control = draw.baseline * site.score
        self.sites.append(site)
        return value

    def branch(self, name: str, size: int) -> int:
        """Add a dimension of ``size`` branches on the left; returns its place."""
        if self._particle_dims:
            raise Unroll(name)
        product = size * math.prod(size for size, branch in self._extra if branch)
        if product > self.max_branches:
            names = [site.name for site in self.sites if site.dim is not None] + [name]
            raise ValueError(
                f"max_branches must be >= the product of branches, {product} at site {name!r} after enumerating "
                f"{names}, got {self.max_branches}; give some of them grad=REINFORCE(), or raise max_branches"
            )
        self._extra.append((size, True))
        self._set_shapes()
        return self.ndim

    @contextmanager
    def dimension(self, size: int) -> Iterator[None]:
        """A dimension on the left in which nothing may branch: of particles, or of enumerated auxiliary values."""
        self._extra.append((size, False))
        self._particle_dims += 1
        self._set_shapes()
        try:
            yield
        finally:
            self._extra.pop()
            self._particle_dims -= 1
            self._set_shapes()

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Draw without regard to gradients for a while."""
        before, self.plain = self.plain, True
        try:
            yield
        finally:
            self.plain = before

    def roll_back(self, num_sites: int, num_scored: int) -> None:
        """Forget sites of an attempt that is made again."""
        del self.sites[num_sites:]
        del self.scored[num_scored:]

    def marks(self) -> tuple[int, int]:
        """How many sites and scored terms there are."""
        return len(self.sites), len(self.scored)

    def combine(self, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Value and surrogate of a cost, of the shape ``base``: sites in reverse order."""
        value, surrogate = cost.detach(), cost
        for site in reversed(self.sites):
            value, surrogate = site.strategy.combine(value, surrogate, site)
        if value.shape != self.base:
            value = value.expand(self.base)
        return value, surrogate if surrogate.shape == self.base else surrogate.expand(self.base)


@dataclass
class Draw:
    """What a strategy's ``draw`` may ask of the evaluation.

    Attributes:
        name: of the site.
        tape: the evaluation.
        dim: place of the branch dimension that :meth:`branch` has added.
        memory: kept in :attr:`Site.memory`.
        baseline: for strategies that use the score: what to subtract from the cost, known before the draw.
    """

    name: str
    tape: Tape
    dim: int | None = None
    memory: Any = None
    baseline: Tensor | float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """What a draw is expanded to at least: particles, samples and batch, and 1 for each branch."""
        return self.tape.draw_shape

    def branch(self, rows: Tensor, event_ndim: int) -> Tensor:
        """Put ``rows``, ``(branches, ..., *event)``, on a new branch dimension of this site."""
        self.dim = self.tape.branch(self.name, len(rows))
        return pad(rows, self.dim, event_ndim)


def pad(rows: Tensor, ndim: int, event_ndim: int = 0) -> Tensor:
    """Insert 1s after the first dimension until there are ``ndim`` before the event dimensions."""
    missing = ndim + event_ndim - rows.ndim
    return rows.reshape(len(rows), *(1,) * missing, *rows.shape[1:]) if missing else rows


def draw_plain(dist: Distribution, shape: tuple[int, ...]) -> Tensor:
    """A sample of at least ``shape``, without a gradient."""
    return _expanded(dist, shape, lambda d, s: d.sample(s))


def draw_pathwise(dist: Distribution, shape: tuple[int, ...]) -> Tensor:
    """A differentiable sample of at least ``shape``."""
    return _expanded(dist, shape, lambda d, s: d.rsample(s))


def _expanded(dist: Distribution, shape: tuple[int, ...], draw: Callable[[Distribution, torch.Size], Tensor]) -> Tensor:
    own = tuple(dist.batch_shape)
    target = own if own == shape else tuple(torch.broadcast_shapes(own, shape))
    left = len(target) - len(own)
    if target[left:] != own:
        return draw(dist.expand(torch.Size(target)), torch.Size())
    return draw(dist, torch.Size(target[:left]))


_local = threading.local()


def active_tape() -> Tape:
    """The evaluation in progress; outside one, a plain one of a single problem."""
    tape: Tape | None = getattr(_local, "tape", None)
    return Tape(plain=True) if tape is None else tape


@contextmanager
def recording(tape: Tape) -> Iterator[Tape]:
    """Make ``tape`` the evaluation in progress."""
    before = getattr(_local, "tape", None)
    _local.tape = tape
    try:
        yield tape
    finally:
        _local.tape = before


@contextmanager
def batched(batch_shape: Sequence[int], num_samples: int = 1) -> Iterator[None]:
    """Run programs by hand for a batch of independent problems: draws and log-densities get this shape.

    Within it choices are drawn plainly, without a gradient. Objectives do this themselves.

    Args:
        batch_shape: sizes of the batch.
        num_samples: independent samples of each problem, >= 1; more than one come as a leading dimension.

    Raises:
        ValueError: ``num_samples`` is out of range.
    """
    with recording(Tape(base_shape(batch_shape, num_samples), len(batch_shape), plain=True)):
        yield


def base_shape(batch_shape: Sequence[int], num_samples: int) -> tuple[int, ...]:
    """``(samples, *batch)``, without a dimension for a single sample."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples}")
    return (num_samples, *batch_shape) if num_samples > 1 else tuple(batch_shape)


Particles = tuple[dict[str, Tensor], list[Tensor]]


def run_particles(
    tape: Tape,
    num_particles: int,
    body: Callable[[], tuple[dict[str, Tensor], dict[str, int], list[Tensor]]],
    control: Callable[[list[Tensor]], Tensor] | None = None,
) -> Particles:
    """Run ``body`` for independent particles, on a new dimension that is the first of all results.

    Where a choice branches, particles run one after the other, each with branches of its own: under a sum over
    particles inside a logarithm branches that particles share would be those of another objective.

    Args:
        tape: the evaluation in progress.
        num_particles: >= 1.
        body: returns a trace, the event dimensions of its values, and log-weights.
        control: maps the log-weights to a baseline of each particle, for the sites within.
    """
    if num_particles > 1:
        marks = tape.marks()
        try:
            with tape.dimension(num_particles):
                trace, event_ndims, weights = body()
                ndim = tape.ndim
        except Unroll as branching:
            tape.roll_back(*marks)
            if control is not None and tape.override is None:
                raise ValueError(
                    f"site {branching.args[0]!r} must not branch (ENUM, MVD) under baselines that leave one particle "
                    "out: give it grad=REINFORCE(), or use iwelbo"
                ) from branching
        else:
            full = (num_particles,) + (1,) * (ndim - 1)
            weights = [w.expand(torch.broadcast_shapes(w.shape, full)) for w in weights]
            trace = {name: _lead(x, num_particles, ndim + event_ndims[name]) for name, x in trace.items()}
            _leave_particles(tape.sites[marks[0] :], None if control is None else control(weights))
            return trace, weights
    runs = [body() for _ in range(num_particles)]
    ndim = tape.ndim
    weights = [_stack([run[2][i] for run in runs], ndim) for i in range(len(runs[0][2]))]
    trace = {name: _stack([run[0][name] for run in runs], ndim + runs[0][1][name]) for name in runs[0][0]}
    return trace, weights


def _lead(x: Tensor, size: int, ndim: int) -> Tensor:
    x = x.reshape(*(1,) * (ndim - x.ndim), *x.shape)
    return x.expand(size, *x.shape[1:])


def _stack(tensors: list[Tensor], ndim: int) -> Tensor:
    tensors = [x.reshape(*(1,) * (ndim - x.ndim), *x.shape) for x in tensors]
    return torch.stack(torch.broadcast_tensors(*tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _leave_particles(sites: list[Site], control: Tensor | None) -> None:
    for site in sites:
        if site.score is None:
            continue
        if control is not None:
            if isinstance(site.control, Tensor) or site.strategy.has_baseline:
                raise ValueError(f"site {site.name!r} must not have a baseline of its own: the objective brings one")
            site.control = control.detach() * site.score
        site.score = site.score.sum(0)
        if isinstance(site.control, Tensor):
            site.control = site.control.sum(0)
