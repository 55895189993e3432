"""Programs whose auxiliary choices are summed out, by importance sampling or exactly."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from lit_methods.vi.programmable.programs import (
    FunctionProgram,
    Program,
    Run,
    Simulation,
    Trace,
    check_all_used,
    program,
    total,
)
from lit_methods.vi.programmable.strategies import support
from lit_methods.vi.programmable.tape import active_tape, pad, run_particles


class SIR:
    """Importance sampling of the auxiliary choices; in :meth:`Program.simulate` the ones that were drawn are included.

    Args:
        num_particles: m >= 1. The bound tightens with m; 1 is that of hierarchical VI.
        proposal: a program of ``(kept trace, *args)`` whose sites are the auxiliary choices. ``None``: the program's
            own prior of them given what is kept before them.

    Raises:
        ValueError: ``num_particles`` is out of range.
    """

    def __init__(self, num_particles: int = 1, proposal: nn.Module | None = None) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles must be >= 1, got {num_particles}")
        self.num_particles = num_particles
        self.proposal = None if proposal is None else program(proposal)


class Enumeration:
    """Exact summation over all values of the auxiliary choices, which must be discrete with finite support."""


def marginal(program: nn.Module, keep: Sequence[str], algorithm: "SIR | Enumeration | None" = None) -> Program:
    """Restrict a program to some of its choices; the others are auxiliary.

    ``simulate`` returns one kept trace and an estimate that over-estimates its log-density on average, ``log_density``
    one that under-estimates it, so that a bound stays a bound on whichever side it is used.

    Args:
        program: whose choices are split; a function is wrapped by :func:`program` first.
        keep: names of the choices that remain.
        algorithm: :class:`SIR`, by default with one particle, or :class:`Enumeration`.

    Raises:
        ValueError: ``keep`` is empty; while running: it names a site that the program does not have.
    """
    return Marginal(program, keep, algorithm)


class Marginal(Program):
    """See :func:`marginal`."""

    def __init__(self, target: Any, keep: Sequence[str], algorithm: SIR | Enumeration | None = None) -> None:
        super().__init__()
        if isinstance(keep, str) or not keep:
            raise ValueError(f"keep must be a list of site names, at least one, got {keep!r}")
        self.program = program(target)
        self.keep = tuple(keep)
        self.algorithm = SIR() if algorithm is None else algorithm
        self.proposal = getattr(self.algorithm, "proposal", None)
        if self.proposal is None and not isinstance(self.program, FunctionProgram):
            raise ValueError(
                f"program must be a function or module unless algorithm=SIR(m, proposal=...), got "
                f"{type(self.program).__name__}"
            )

    def simulate(self, *args: Any) -> Simulation:
        """Run the program; ``log_w`` averages over the auxiliary choices drawn and ``m - 1`` more."""
        if isinstance(self.algorithm, Enumeration):
            trace, _, value = self.program.simulate(*args)
            kept = self._kept(trace)
            return Simulation(kept, self.log_density(kept, *args), value)
        if self.proposal is None:
            assert isinstance(self.program, FunctionProgram)
            run = Run()
            value = run(self.program.function, *args)
            kept = self._kept(run.trace)
            own = total({name: x for name, x in run.log_probs.items() if name in kept or name not in run.trace})
        else:
            trace, log_w, value = self.program.simulate(*args)
            kept = self._kept(trace)
            own = log_w - self.proposal.log_density(trace.select(n for n in trace if n not in kept), kept, *args)
        if self.algorithm.num_particles == 1:
            return Simulation(kept, own, value)
        others = self._weights(kept, self.algorithm.num_particles - 1, *args)
        shape = torch.broadcast_shapes(own.shape, others.shape[1:])
        weights = torch.cat([own.expand(1, *shape), others.expand(len(others), *shape)])
        return Simulation(kept, log_mean_exp(weights), value)

    def log_density(self, trace: Mapping[str, Tensor], *args: Any) -> Tensor:
        """Average over ``m`` draws of the auxiliary choices, or over all of their values."""
        self._check_given(trace)
        if isinstance(self.algorithm, Enumeration):
            return self._enumerate(trace, *args)
        return log_mean_exp(self._weights(trace, self.algorithm.num_particles, *args))

    def generate(self, *args: Any) -> tuple[Trace, Trace]:
        """Draw kept choices and observations."""
        choices, observations = self.program.generate(*args)
        return self._kept(choices), observations

    def _kept(self, trace: Trace) -> Trace:
        unknown = [name for name in self.keep if name not in trace]
        if unknown:
            raise ValueError(f"keep must name sites of the program, {list(trace)}, got {unknown} too")
        return trace.select(self.keep)

    def _check_given(self, trace: Mapping[str, Tensor]) -> None:
        if set(trace) != set(self.keep):
            raise ValueError(f"trace must hold the sites that are kept, {list(self.keep)}, got {list(trace)}")

    def _weights(self, kept: Mapping[str, Tensor], num_particles: int, *args: Any) -> Tensor:
        """Log-weights of fresh auxiliary choices, ``(particles, ...)``."""

        def one() -> tuple[dict[str, Tensor], dict[str, int], list[Tensor]]:
            if self.proposal is not None:
                auxiliary, log_r, _ = self.proposal.simulate(kept, *args)
                return {}, {}, [self.program.log_density({**kept, **auxiliary}, *args) - log_r]
            return {}, {}, [self._partial(Run(kept, partial=True), kept, *args)]

        return run_particles(active_tape(), num_particles, one)[1][0]

    def _partial(self, run: Run, kept: Mapping[str, Tensor], *args: Any) -> Tensor:
        """The density of what is kept, given auxiliary choices drawn from their prior."""
        assert isinstance(self.program, FunctionProgram)
        run(self.program.function, *args)
        check_all_used(kept, run)
        return total({name: x for name, x in run.log_probs.items() if name in kept or name not in run.trace})

    def _enumerate(self, kept: Mapping[str, Tensor], *args: Any) -> Tensor:
        tape = active_tape()
        ndim, branches = tape.ndim, 1
        with ExitStack() as dimensions:

            def values(name: str, dist: Distribution) -> Tensor:
                nonlocal branches
                rows = support(dist, name)
                branches *= len(rows)
                if branches > tape.max_branches:
                    raise ValueError(f"max_branches must be >= {branches} for site {name!r}, got {tape.max_branches}")
                dimensions.enter_context(tape.dimension(len(rows)))
                run.tape = tape
                return pad(rows.reshape(len(rows), *dist.event_shape), tape.ndim, len(dist.event_shape))

            run = Run(kept, partial=True, enumerate_rest=values)
            assert isinstance(self.program, FunctionProgram)
            run(self.program.function, *args)
            check_all_used(kept, run)
            log_w = total(run.log_probs)
        extra = log_w.ndim - ndim
        return log_w.logsumexp(tuple(range(extra))) if extra > 0 else log_w


def log_mean_exp(log_w: Tensor) -> Tensor:
    """``log mean exp`` over the first dimension."""
    if len(log_w) == 1:
        return log_w[0]
    return log_w.logsumexp(0) - math.log(len(log_w))
