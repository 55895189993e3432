"""Objectives of variational inference: short programs over a model ``p`` and a guide ``q``, all maximised.

Each is decorated by :func:`objective`, which turns it into an unbiased estimator of its value and gradient.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_methods.vi.programmable.marginal import SIR, Marginal, log_mean_exp
from lit_methods.vi.programmable.normalization import Normalized
from lit_methods.vi.programmable.programs import FunctionProgram, Program, Trace, program
from lit_methods.vi.programmable.strategies import fits
from lit_methods.vi.programmable.tape import Tape, Unroll, active_tape, base_shape, recording, run_particles


@dataclass
class Estimate:
    """An estimate of an objective for each problem of a batch.

    Attributes:
        value: ``(*batch_shape)``, the mean over samples, without a gradient.
        surrogate: the same numbers, with an unbiased gradient. Minimise ``-surrogate.mean()``.
        baseline_loss: a number to be minimised too where baseline networks learn; 0 otherwise.
    """

    value: Tensor
    surrogate: Tensor
    baseline_loss: Tensor


class Objective:
    """An objective of a model and a guide; :func:`objective` makes it. It keeps no state between calls."""

    def __init__(self, function: Callable[..., Tensor], model: Any, guide: Any, settings: Mapping[str, Any]) -> None:
        self.function = function
        self.model = program(model)
        self.guide = program(guide)
        self.settings = dict(settings)

    def __repr__(self) -> str:
        return f"{self.function.__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"

    def cost(self, *data: Any) -> Tensor:
        """The integrand, within another objective or strategy-aware code; no estimator is applied."""
        return self.function(self.model, self.guide, *data, **self.settings)

    def __call__(
        self,
        *data: Any,
        batch_shape: Sequence[int] = (),
        num_samples: int = 1,
        chunk_size: int | None = None,
        max_branches: int = 4096,
    ) -> Estimate:
        """Estimate value and gradient.

        Args:
            *data: arguments of the programs.
            batch_shape: shape of the independent problems in ``data``: ``(len(x),)`` when each row has latent
                variables of its own, ``()`` when all data make one problem.
            num_samples: independent estimates that are averaged, >= 1; a leading dimension of all draws.
            chunk_size: at most so many samples at a time, one chunk after the other, each computed again in the
                backward pass: memory of one chunk. Baselines that leave one out do so within a chunk. ``None``: all.
            max_branches: largest product of the numbers of values that enumerated sites try, >= 1.

        Raises:
            ValueError: an argument out of range, programs that do not fit, or a cost that is infinite or no number.
        """
        for name, size in (("num_samples", num_samples), ("chunk_size", chunk_size), ("max_branches", max_branches)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be >= 1, got {size}")
        if chunk_size is None or chunk_size >= num_samples:
            return self.estimate(data, make_tape(batch_shape, num_samples, max_branches))
        sizes = [chunk_size] * (num_samples // chunk_size)
        if num_samples % chunk_size:
            sizes.append(num_samples % chunk_size)
        parts = [(n / num_samples, self._chunk(data, batch_shape, n, max_branches)) for n in sizes]
        value, surrogate, loss = (sum(share * part[i] for share, part in parts) for i in range(3))
        return Estimate(value, surrogate, loss)  # type: ignore[arg-type]

    def _chunk(
        self, data: tuple[Any, ...], batch_shape: Sequence[int], num_samples: int, max_branches: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        moves: list[list[Callable[[], None]]] = []

        def run() -> tuple[Tensor, Tensor, Tensor]:
            tape = make_tape(batch_shape, num_samples, max_branches)
            estimate = self.estimate(data, tape, finish=False)
            moves.append(tape.after)
            return estimate.value, estimate.surrogate, estimate.baseline_loss

        result = checkpoint(run, use_reentrant=False)
        for move in moves[0]:  # those of the backward pass are the same again
            move()
        return result

    def estimate(self, data: tuple[Any, ...], tape: Tape, finish: bool = True) -> Estimate:
        """One evaluation on a given tape."""
        with recording(tape):
            try:
                cost = self.cost(*data)
            except Unroll as branching:
                raise ValueError(
                    f"site {branching.args[0]!r} must not branch (ENUM, MVD) where a program enumerates auxiliary "
                    "choices: give it grad=REINFORCE()"
                ) from None
            if not isinstance(cost, Tensor):
                raise ValueError(f"objective {self!r} must return a tensor, got {type(cost).__name__}")
            if not fits(tuple(cost.shape), tape.shape):
                raise ValueError(
                    f"objective {self!r} must return one number a problem, a shape that broadcasts to "
                    f"{list(tape.shape)}, got {list(cost.shape)}"
                )
            value, surrogate = tape.combine(cost)
        if not torch.compiler.is_compiling():
            _check_finite(value, tape, self)
        if len(tape.base) > tape.batch_ndim:
            value, surrogate = value.mean(0), surrogate.mean(0)
        if finish:
            for move in tape.after:
                move()
        loss = sum(tape.baseline_losses, start=value.new_zeros(()))
        return Estimate(value, surrogate, loss)


def make_tape(batch_shape: Sequence[int], num_samples: int, max_branches: int = 4096, override: Any = None) -> Tape:
    """A tape for so many samples of a batch of problems."""
    return Tape(base_shape(batch_shape, num_samples), len(batch_shape), max_branches=max_branches, override=override)


def _check_finite(value: Tensor, tape: Tape, objective: Objective) -> None:
    if math.isfinite(value.sum()) or torch.isfinite(value).all():  # one wait for the device, if all is well
        return
    bad = [term for term in tape.scored if not torch.isfinite(term.log_prob).all()]
    found = float(value[~torch.isfinite(value)].flatten()[0])
    if bad:
        kind = "nan" if torch.isnan(bad[0].log_prob).any() else "-inf"
        where = f"site {bad[0].name!r} has a log-probability of {kind}"
    else:
        where = "all sites have finite log-probabilities"
    raise ValueError(
        f"value of {objective!r} must be finite, got {found} (for every particle of a problem): {where}. Keep standard "
        "deviations and probabilities of the model and the guide away from 0 (clamp them), and let the guide's values "
        "lie in the support of the model"
    )


class ObjectiveFactory(Protocol):
    """What :func:`objective` makes: ``factory(model, guide, **settings)`` gives an :class:`Objective`."""

    def __call__(self, p: Any, q: Any, **settings: Any) -> Objective:
        """The objective of a model and a guide."""
        ...


def objective(function: Callable[..., Tensor]) -> ObjectiveFactory:
    """Make an objective of a short program.

    Args:
        function: of ``(p, q, *data)``, and settings that are keyword-only. It calls ``p.log_density(trace, *data)``,
            ``q.simulate(*data)`` and the like, and returns a tensor of one number a problem, to be maximised. Sums over
            particles inside a logarithm are those of :func:`log_weights`.

    Returns:
        ``factory(p, q, **settings)``, whose result is called with the data.

    Example:
        >>> @objective
        ... def mine(p, q, *data, beta=1.0):
        ...     trace, log_q, _ = q.simulate(*data)
        ...     return p.log_density(trace, *data) - beta * log_q
    """
    parameters = inspect.signature(function).parameters
    known = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]

    def factory(p: Any, q: Any, **settings: Any) -> Objective:
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"settings of {function.__name__} must be among {known}, got {unknown}")
        if settings.get("num_particles", 1) < 1:
            raise ValueError(f"num_particles must be >= 1, got {settings['num_particles']}")
        return Objective(function, p, q, settings)

    factory.__name__ = factory.__qualname__ = function.__name__
    factory.__doc__ = function.__doc__
    factory.__module__ = function.__module__
    factory.settings = known  # type: ignore[attr-defined]
    return factory


def log_weights(
    p: Program,
    q: Program,
    num_particles: int,
    *data: Any,
    control: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``log p - log q`` of independent draws of the guide, ``(particles, ..., *batch)``, for objectives of your own.

    Args:
        p: the model.
        q: the guide.
        num_particles: >= 1.
        *data: arguments of both.
        control: maps the log-weights to a baseline of each particle, of their shape, for the REINFORCE sites of the
            particle; it must not depend on the particle itself.
    """

    def one() -> tuple[dict[str, Tensor], dict[str, int], list[Tensor]]:
        trace, log_q, _ = q.simulate(*data)
        return {}, {}, [p.log_density(trace, *data) - log_q]

    baselines = None if control is None else lambda weights: control(weights[0])
    return run_particles(active_tape(), num_particles, one, baselines)[1][0]


@objective
def elbo(p: Program, q: Program, *data: Any) -> Tensor:
    """Evidence lower bound: ``E_q[log p(x, y) - log q(x)]``."""
    trace, log_q, _ = q.simulate(*data)
    return p.log_density(trace, *data) - log_q


@objective
def iwelbo(p: Program, q: Program, *data: Any, num_particles: int = 5) -> Tensor:
    """Importance-weighted bound of ``num_particles`` N >= 1 draws: ``E log mean p / q``; grows to the log-evidence."""
    return log_mean_exp(log_weights(p, q, num_particles, *data))


def hvi(p: Any, q: Any, keep: Sequence[str]) -> Objective:
    """Hierarchical VI: the ELBO of a guide with auxiliary choices, those not in ``keep``, summed out by one draw."""
    return elbo(p, Marginal(q, keep, SIR(1)))


def iwhvi(p: Any, q: Any, keep: Sequence[str], num_auxiliary: int = 5) -> Objective:
    """Importance-weighted hierarchical VI: the same by ``num_auxiliary`` m >= 1 draws."""
    return elbo(p, Marginal(q, keep, SIR(num_auxiliary)))


def diwhvi(p: Any, q: Any, keep: Sequence[str], num_particles: int = 5, num_auxiliary: int = 5) -> Objective:
    """Doubly importance-weighted: the IWELBO of ``num_particles`` draws, with a guide as in :func:`iwhvi`."""
    return iwelbo(p, Marginal(q, keep, SIR(num_auxiliary)), num_particles=num_particles)


@objective
def forward_kl(p: Program, q: Program, *data: Any, as_data: Callable[[Trace, Any], Any] | None = None) -> Tensor:
    """Sleep phase: ``E_p[log q(x | y)]`` over choices and observations of the model, which gets no gradient.

    ``as_data`` maps the drawn observations and the data to the guide's argument. ``None`` does it for a tensor with one
    observed site, and for a dict or NamedTuple with a key or field for each observed site.
    """
    with torch.no_grad():
        trace, observations = p.generate(*data)
        drawn = [_replace(observations, *data)] if as_data is None else [as_data(observations, *data)]
    return q.log_density(trace, *drawn)


def _replace(observations: Trace, data: Any) -> Any:
    if isinstance(data, Tensor) and len(observations) == 1:
        return next(iter(observations.values()))
    if isinstance(data, Mapping) and set(observations) <= set(data):
        return {**data, **observations}
    if hasattr(data, "_replace") and set(observations) <= set(data._fields):
        return data._replace(**observations)
    raise ValueError(
        f"as_data must be given for observed sites {list(observations)} and data of type {type(data).__name__}, "
        "got None"
    )


def _wake(p: Program, q: Program, num_particles: int, *data: Any) -> tuple[Tensor, Tensor]:
    """Expected ``log q`` and ``log p`` over what SIR picks; no gradient passes the draws and the pick."""
    if not (isinstance(p, FunctionProgram) and isinstance(q, FunctionProgram)):
        with torch.no_grad():
            trace, _, _ = Normalized(p, q, num_particles).simulate(*data)
        return q.log_density(trace, *data), p.log_density(trace, *data)
    tape = active_tape()

    def one() -> tuple[dict[str, Tensor], dict[str, int], list[Tensor]]:
        with tape.plainly():
            trace, log_q, _ = q.simulate(*data)
        trace = Trace({name: x.detach() for name, x in trace.items()}, trace.event_ndims)
        return {}, {}, [log_q, p.log_density(trace, *data)]

    log_q, log_p = run_particles(tape, num_particles, one)[1]  # exact densities: those of the weights serve again
    weights = (log_p - log_q).detach().softmax(0)
    return (weights * log_q).sum(0), (weights * log_p).sum(0)


@objective
def wake_q(p: Program, q: Program, *data: Any, num_particles: int = 10) -> Tensor:
    """Wake phase of the guide: ``E log q(x)`` over SIR's approximate posterior of N draws; no gradient to the model."""
    return _wake(p, q, num_particles, *data)[0]


@objective
def wake_p(p: Program, q: Program, *data: Any, num_particles: int = 10) -> Tensor:
    """Wake phase of the model: ``E log p(x, y)`` over SIR's approximate posterior; no gradient to the guide."""
    return _wake(p, q, num_particles, *data)[1]


@objective
def reweighted_wake_sleep(p: Program, q: Program, *data: Any, num_particles: int = 10) -> Tensor:
    """Both wake phases on the same draws: their sum, for models and guides that share no parameters."""
    log_q, log_p = _wake(p, q, num_particles, *data)
    return log_q + log_p


@objective
def symmetric(p: Program, q: Program, *data: Any, num_particles: int = 10) -> Tensor:
    """The ELBO plus the guide's wake phase: reverse and forward divergence."""
    return elbo(p, q).cost(*data) + wake_q(p, q, num_particles=num_particles).cost(*data)


@objective
def renyi(p: Program, q: Program, *data: Any, alpha: float = 0.5, num_particles: int = 5) -> Tensor:
    """Rényi's bound of order ``alpha`` != 1: ``log mean (p / q)^(1 - alpha) / (1 - alpha)``; 0: the IWELBO."""
    if alpha == 1:
        raise ValueError("alpha must not be 1, got 1: that is the elbo")
    return log_mean_exp((1 - alpha) * log_weights(p, q, num_particles, *data)) / (1 - alpha)


@objective
def vimco(p: Program, q: Program, *data: Any, num_particles: int = 5) -> Tensor:
    """The IWELBO of N >= 2 draws; the baseline of a REINFORCE site is the bound without its particle."""
    if num_particles < 2:
        raise ValueError(f"num_particles must be >= 2, got {num_particles}")
    return log_mean_exp(log_weights(p, q, num_particles, *data, control=_bound_of_others))


def _bound_of_others(log_w: Tensor) -> Tensor:
    """For each particle, the bound with its log-weight replaced by the mean of the others'."""
    log_w = log_w.detach()
    n = len(log_w)
    others = (log_w.sum(0) - log_w) / (n - 1)
    replaced = log_w.expand(n, *log_w.shape).clone()
    index = torch.arange(n, device=log_w.device)
    replaced[index, index] = others
    return replaced.logsumexp(1) - math.log(n)


LIBRARY: dict[str, Any] = {
    "elbo": elbo,
    "iwelbo": iwelbo,
    "forward_kl": forward_kl,
    "wake_q": wake_q,
    "wake_p": wake_p,
    "reweighted_wake_sleep": reweighted_wake_sleep,
    "symmetric": symmetric,
    "renyi": renyi,
    "vimco": vimco,
    "hvi": hvi,
    "iwhvi": iwhvi,
    "diwhvi": diwhvi,
}
