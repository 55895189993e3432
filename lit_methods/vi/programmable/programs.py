"""Programs: ordinary functions with named random choices, which can be simulated and scored."""

import copy
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from lit_methods.vi.programmable.strategies import Strategy, fits, resolve
from lit_methods.vi.programmable.tape import Scored, Tape, active_tape, draw_plain


class Trace(dict[str, Tensor]):
    """The values of the random choices of one run, by name.

    Attributes:
        event_ndims: number of event dimensions of each value.
    """

    def __init__(
        self, values: Mapping[str, Tensor] | None = None, event_ndims: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(values or {})
        self.event_ndims: dict[str, int] = dict(event_ndims or {})

    def select(self, names: Any) -> "Trace":
        """The same values under fewer names."""
        return Trace({name: self[name] for name in names}, {name: self.event_ndims[name] for name in names})


class Simulation(NamedTuple):
    """What a run of a program gives: ``trace, log_w, value``.

    Attributes:
        trace: name -> value, of shapes ``(..., *batch, *event)``.
        log_w: log-density of the trace, or an estimate with ``E[exp(-log_w) | trace] = 1 / p(trace)``.
        value: what the program returns.
    """

    trace: Trace
    log_w: Tensor
    value: Any


class Prediction(NamedTuple):
    """What :meth:`Program.predict` gives.

    Attributes:
        drawn: observations, drawn.
        observed: the data in their place, as the program gave them to :func:`observe`.
        value: what the program returns.
    """

    drawn: Trace
    observed: Trace
    value: Any


class Program(nn.Module):
    """A distribution over traces, exact or estimated. Derive from it for one that is neither function nor module."""

    @abstractmethod
    def simulate(self, *args: Any) -> Simulation:
        """Run it. On average ``exp(-log_w)`` is 1 / density: the density is over-estimated."""

    @abstractmethod
    def log_density(self, trace: Mapping[str, Tensor], *args: Any) -> Tensor:
        """Score a trace. On average ``exp(log_w)`` is the density: its logarithm is under-estimated."""

    def generate(self, *args: Any) -> tuple[Trace, Trace]:
        """Draw choices and observations too, as if nothing had been observed: ``(choices, observations)``."""
        raise NotImplementedError(f"{type(self).__name__} cannot generate observations")

    def predict(self, trace: Mapping[str, Tensor], *args: Any) -> Prediction:
        """Draw observations given the choices in ``trace``."""
        raise NotImplementedError(f"{type(self).__name__} cannot predict observations")


class FunctionProgram(Program):
    """A program that is a function, or a module whose ``forward`` is one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def simulate(self, *args: Any) -> Simulation:
        """Run the function; ``log_w`` is exact, with the terms of its observations."""
        run = Run()
        value = run(self.function, *args)
        return Simulation(run.trace, total(run.log_probs), value)

    def log_density(self, trace: Mapping[str, Tensor], *args: Any) -> Tensor:
        """Run the function with its choices replaced by those of ``trace``; exact."""
        run = Run(trace)
        run(self.function, *args)
        check_all_used(trace, run)
        return total(run.log_probs)

    def generate(self, *args: Any) -> tuple[Trace, Trace]:
        """Draw choices and observations too: ``(choices, observations)``."""
        run = Run(draw_observations=True)
        run(self.function, *args)
        return run.trace, run.observations

    def predict(self, trace: Mapping[str, Tensor], *args: Any) -> Prediction:
        """Draw observations given the choices in ``trace``."""
        run = Run(trace, draw_observations=True)
        value = run(self.function, *args)
        check_all_used(trace, run)
        return Prediction(run.observations, run.observed, value)


def program(function: Callable[..., Any]) -> Program:
    """Make a program of a function or module that calls :func:`sample` and :func:`observe`.

    Args:
        function: called with the data; an ``nn.Module`` is one whose ``forward`` is called. A program stays itself.

    Raises:
        ValueError: it cannot be called.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> def model(data):
        ...     x = sample("x", Normal(0.0, 1.0))
        ...     observe("y", Normal(x, 0.5), data)
        >>> program(model).log_density({"x": torch.tensor(0.0)}, torch.tensor(0.0)).item()
        -1.1447298526763916
    """
    if isinstance(function, Program):
        return function
    if not callable(function):
        raise ValueError(f"function must be callable, got {function!r}")
    return FunctionProgram(function)


def sample(name: str, dist: Distribution, grad: Strategy | type[Strategy] | str = "auto") -> Tensor:
    """A random choice.

    Args:
        name: of the site; once in each run of a program.
        dist: whose batch shape is that of the problems, or broadcasts to it: independent components of one problem
            are event dimensions, ``Independent(dist, 1)``.
        grad: REPARAM, REINFORCE(baseline=...), ENUM, MVD, or a :class:`Strategy` of your own; "auto": REPARAM where the
            distribution has ``rsample``, else REINFORCE().

    Returns:
        Its value ``(..., *batch, *event)``; with ENUM and MVD all values to be tried, on a new leftmost dimension, so
        that Python's ``if`` must not ask it: use ``torch.where`` or :func:`cond`.

    Raises:
        ValueError: a name that was there before, or shapes that do not fit.
        RuntimeError: called outside a program.
    """
    return _running("sample", name).sample(name, dist, grad)


def observe(name: str, dist: Distribution, value: Tensor | float, scale: float = 1.0) -> Tensor:
    """Condition on data: multiply the density by that of ``value``.

    Args:
        name: of the site; once in each run of a program.
        dist: as in :func:`sample`.
        value: ``(*batch, *event)``, or a number.
        scale: multiplies the log-density: N / B when B of N exchangeable observations of one problem are seen; > 0.

    Returns:
        ``value``, or what was drawn in its stead when the program generates data.

    Raises:
        ValueError: as for :func:`sample`.
        RuntimeError: called outside a program.
    """
    if not scale > 0:
        raise ValueError(f"scale of site {name!r} must be > 0, got {scale}")
    return _running("observe", name).observe(name, dist, value, scale)


def cond(predicate: Tensor, then: Callable[[], Tensor], otherwise: Callable[[], Tensor], event_ndim: int = 0) -> Tensor:
    """What ``if`` would do, where the predicate is a tensor: both are run, and sites count where they are chosen.

    Args:
        predicate: booleans of the shape of a log-probability.
        then: gives the value where the predicate holds.
        otherwise: gives it elsewhere; the sites of the two need different names.
        event_ndim: number of event dimensions of what they give.
    """
    run = _running("cond", "")
    with run.where(predicate):
        yes = torch.as_tensor(then())
    with run.where(~predicate):
        no = torch.as_tensor(otherwise())
    return torch.where(predicate.reshape(*predicate.shape, *(1,) * event_ndim), yes, no)


_local = threading.local()


def _running(what: str, name: str) -> "Run":
    run: Run | None = getattr(_local, "run", None)
    if run is None:
        raise RuntimeError(f"{what}({name!r}) was called outside a program: write program(f).simulate(...), not f(...)")
    return run


class Run:
    """One run of a function: what its sites do, and what they leave.

    Args:
        given: values that choices take, by name; ``None``: all are drawn.
        partial: draw the choices that ``given`` lacks, instead of refusing.
        draw_observations: draw observations, instead of scoring them.
        enumerate_rest: with ``partial``: give the rest all values of their support, each on a dimension of its own.
    """

    def __init__(
        self,
        given: Mapping[str, Tensor] | None = None,
        partial: bool = False,
        draw_observations: bool = False,
        enumerate_rest: "Callable[[str, Distribution], Tensor] | None" = None,
    ) -> None:
        self.given = given
        self.partial = partial or given is None
        self.draw_observations = draw_observations
        self.enumerate_rest = enumerate_rest
        self.trace = Trace()
        self.observations = Trace()
        self.observed = Trace()
        self.log_probs: dict[str, Tensor] = {}
        self.masks: list[Tensor] = []
        self.tape: Tape = active_tape()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the function with its sites handled here."""
        before = getattr(_local, "run", None)
        _local.run = self
        try:
            return function(*args)
        finally:
            _local.run = before

    @contextmanager
    def where(self, mask: Tensor) -> Iterator[None]:
        """Let sites count where a mask holds."""
        self.masks.append(mask)
        try:
            yield
        finally:
            self.masks.pop()

    def sample(self, name: str, dist: Distribution, grad: Any) -> Tensor:
        """A choice, drawn or given."""
        self._check_new(name)
        dist = _checked(name, dist, self.tape)
        with _full_precision():
            if self.given is not None and name in self.given:
                value = self.given[name]
                log_prob = self._score(name, dist, value)
            elif not self.partial:
                raise ValueError(
                    f"site {name!r} must be in the trace, which has {sorted(self.given or {})}; sites of the program "
                    f"so far: {[*self.log_probs, name]}"
                )
            elif self.enumerate_rest is not None:
                value = self.enumerate_rest(name, dist)
                log_prob = self._score(name, dist, value)
            else:
                value = self.tape.draw(name, dist, resolve(grad, dist, name))
                log_prob = self._score(name, dist, value, validate=False)
        self.trace[name] = value
        self.trace.event_ndims[name] = len(dist.event_shape)
        self.log_probs[name] = log_prob
        return value

    def observe(self, name: str, dist: Distribution, value: Tensor | float, scale: float) -> Tensor:
        """Data, scored or drawn."""
        self._check_new(name)
        dist = _checked(name, dist, self.tape)
        if self.draw_observations:
            with torch.no_grad(), _full_precision():
                drawn = draw_plain(dist, self.tape.draw_shape)
            self.observations[name] = drawn
            self.observations.event_ndims[name] = len(dist.event_shape)
            self.observed[name] = torch.as_tensor(value)
            self.observed.event_ndims[name] = len(dist.event_shape)
            self.log_probs[name] = torch.zeros(())
            return drawn
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=torch.get_default_dtype())
        _check_observed(name, dist, value, self.tape)
        with _full_precision():
            log_prob = self._score(name, dist, value)
        self.log_probs[name] = log_prob if scale == 1.0 else scale * log_prob
        return value

    def _check_new(self, name: str) -> None:
        if name in self.log_probs:
            raise ValueError(
                f"name must be used once in a program, got {name!r} again; sites so far: {list(self.log_probs)}"
            )

    def _score(self, name: str, dist: Distribution, value: Tensor, validate: bool = True) -> Tensor:
        event = tuple(dist.event_shape)
        if event and tuple(value.shape[value.ndim - len(event) :]) != event:
            raise ValueError(
                f"value of site {name!r} must end in the event shape {list(event)} of its {type(dist).__name__}, got "
                f"{list(value.shape)}"
            )
        # torch.compile turns the default of all distributions off for good; what counts is what this one was given.
        validates = dist._validate_args if torch.compiler.is_compiling() else vars(dist).get("_validate_args", True)
        dist._validate_args = validate and validates
        try:
            log_prob = dist.log_prob(value)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"value of site {name!r} must suit {type(dist).__name__} of batch shape {list(dist.batch_shape)} and "
                f"event shape {list(event)}, got the shape {list(value.shape)}: {error}"
            ) from error
        finally:
            dist._validate_args = validates
        full = self.tape.shape
        if log_prob.shape != full and not fits(tuple(log_prob.shape), full):
            raise ValueError(
                f"log-probability of site {name!r} must have a shape that broadcasts to {list(full)} "
                f"({_dims(self.tape)}), got {list(log_prob.shape)} from a value {list(value.shape)} under "
                f"{type(dist).__name__} of batch shape {list(dist.batch_shape)}; {_HINT}"
            )
        for mask in self.masks:
            log_prob = torch.where(mask, log_prob, 0.0)
        self.tape.scored.append(Scored(name, log_prob))
        return log_prob


_HINT = (
    "independent components of one problem are event dimensions: Independent(dist, 1); a batch of problems is told "
    "by batch_shape"
)


def _dims(tape: Tape) -> str:
    extra = tape.ndim - len(tape.base)
    samples = len(tape.base) - tape.batch_ndim
    return f"{extra} of particles and branches, {samples} of samples, batch shape {list(tape.batch)}"


def _checked(name: str, dist: Distribution, tape: Tape) -> Distribution:
    """The distribution in full precision; refuses a batch shape that is not that of the problems."""
    if not isinstance(dist, Distribution):
        raise ValueError(f"dist of site {name!r} must be a torch.distributions.Distribution, got {type(dist).__name__}")
    own = tuple(dist.batch_shape)
    if own != tape.shape and not fits(own, tape.shape):
        raise ValueError(
            f"distribution of site {name!r} must have a batch shape that broadcasts to {list(tape.shape)} "
            f"({_dims(tape)}), got {list(own)}; {_HINT}"
        )
    return _widen(dist)


def _check_observed(name: str, dist: Distribution, value: Tensor, tape: Tape) -> None:
    shape = tuple(value.shape[: value.ndim - len(dist.event_shape)])
    batch = tape.batch
    if len(batch) < len(shape) <= len(tape.base) and shape[len(shape) - len(batch) :] != batch:
        raise ValueError(
            f"value of site {name!r} must have the batch shape {list(batch)} before its event dimensions "
            f"{list(dist.event_shape)}, got {list(value.shape)}"
        )


_HALVES = (torch.bfloat16, torch.float16)


def _widen(dist: Distribution) -> Distribution:
    """The same distribution with float32 in place of half-precision parameters."""
    narrow: dict[str, Tensor | Distribution] = {}
    for key, x in vars(dist).items():
        if isinstance(x, Tensor):
            if x.dtype in _HALVES:
                narrow[key] = x.float()
        elif isinstance(x, Distribution):
            wide = _widen(x)
            if wide is not x:
                narrow[key] = wide
    if not narrow:
        return dist
    wide_dist = copy.copy(dist)
    vars(wide_dist).update(narrow)
    return wide_dist


def _full_precision() -> Any:
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return torch.autocast(device, enabled=False)
    return nullcontext()


def total(log_probs: Mapping[str, Tensor]) -> Tensor:
    """The sum of all terms."""
    terms = iter(log_probs.values())
    log_w = next(terms, None)
    if log_w is None:
        return torch.zeros(())
    for term in terms:
        log_w = log_w + term
    return log_w


def check_all_used(trace: Mapping[str, Tensor], run: Run) -> None:
    """Refuse a trace with names that the program does not have."""
    extra = [name for name in trace if name not in run.trace]
    if extra:
        raise ValueError(
            f"trace must hold the sites {list(run.trace)} of the program only, got {list(trace)}, with {extra} too; "
            "auxiliary choices of a guide are summed out by marginal(guide, keep=...)"
        )
