"""The posterior of a program as a program: sampling importance resampling with its own density."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from lit_methods.vi.programmable.marginal import log_mean_exp
from lit_methods.vi.programmable.programs import Program, Simulation, Trace, program
from lit_methods.vi.programmable.strategies import ENUM, Strategy
from lit_methods.vi.programmable.tape import active_tape, run_particles


def normalize(target: nn.Module, proposal: nn.Module, num_particles: int = 1, grad: Strategy = ENUM) -> "Normalized":
    """The law of the particle that sampling importance resampling picks.

    ``simulate`` draws N particles of the proposal and picks one by its weight; ``log_density`` is an unbiased estimate
    of the density of that law (not of the target's), exact on average.

    Args:
        target: an unnormalised program: a model with its observations.
        proposal: a program over the same sites.
        num_particles: N >= 1. With 1 it is the proposal; as N grows it becomes the posterior.
        grad: the gradient estimator of the pick: ENUM (over the particles; cheap, since only what follows is evaluated
            for each) or REINFORCE(...). Within ``torch.no_grad()``, as in wake phases, no gradient passes it.

    Raises:
        ValueError: ``num_particles`` is out of range.
    """
    return Normalized(target, proposal, num_particles, grad)


class Normalized(Program):
    """See :func:`normalize`."""

    def __init__(self, target: Any, proposal: Any, num_particles: int = 1, grad: Strategy = ENUM) -> None:
        super().__init__()
        if num_particles < 1:
            raise ValueError(f"num_particles must be >= 1, got {num_particles}")
        self.target = program(target)
        self.proposal = program(proposal)
        self.num_particles = num_particles
        self.grad = grad

    def simulate(self, *args: Any) -> Simulation:
        """Pick one of N particles; its value is ``None``."""
        tape = active_tape()
        trace, event_ndims, log_gamma, log_w = self._particles(self.num_particles, *args)
        ndim = tape.ndim
        index = tape.draw("particle", Categorical(logits=log_w.movedim(0, -1)), self.grad)
        branches = index.ndim > ndim  # the pick itself is enumerated

        def pick(x: Tensor, event_ndim: int) -> Tensor:
            rows = index if branches else index.unsqueeze(0)
            shape = torch.broadcast_shapes(rows.shape[1:], x.shape[1 : x.ndim - event_ndim])
            event = x.shape[x.ndim - event_ndim :]
            x = x.expand(len(x), *shape, *event)
            where = rows.expand(len(rows), *shape).reshape(len(rows), *shape, *(1,) * event_ndim)
            picked = x.take_along_dim(where.expand(len(rows), *shape, *event), 0)
            return picked if branches else picked.squeeze(0)

        picked = Trace({name: pick(x, event_ndims[name]) for name, x in trace.items()}, event_ndims)
        return Simulation(picked, pick(log_gamma, 0) - log_mean_exp(log_w), None)

    def log_density(self, trace: Mapping[str, Tensor], *args: Any) -> Tensor:
        """``trace`` as one particle among N - 1 of the proposal's."""
        log_gamma = self.target.log_density(trace, *args)
        own = log_gamma - self.proposal.log_density(trace, *args)
        if self.num_particles == 1:
            return log_gamma - own
        _, _, _, others = self._particles(self.num_particles - 1, *args)
        shape = torch.broadcast_shapes(own.shape, others.shape[1:])
        weights = torch.cat([own.expand(1, *shape), others.expand(len(others), *shape)])
        return log_gamma - log_mean_exp(weights)

    def log_evidence_estimate(self, *args: Any) -> Tensor:
        """``log mean`` of N weights: its expectation is a lower bound of the log-evidence, and IWELBO's integrand."""
        return log_mean_exp(self._particles(self.num_particles, *args)[3])

    def _particles(self, num_particles: int, *args: Any) -> tuple[dict[str, Tensor], dict[str, int], Tensor, Tensor]:
        event_ndims: dict[str, int] = {}

        def one() -> tuple[dict[str, Tensor], dict[str, int], list[Tensor]]:
            trace, log_q, _ = self.proposal.simulate(*args)
            event_ndims.update(trace.event_ndims)
            log_gamma = self.target.log_density(trace, *args)
            return trace, trace.event_ndims, [log_gamma, log_gamma - log_q]

        trace, (log_gamma, log_w) = run_particles(active_tape(), num_particles, one)
        return trace, event_ndims, log_gamma, log_w
