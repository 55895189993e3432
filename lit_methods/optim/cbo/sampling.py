r"""Consensus-based sampling: covariance noise, which samples :math:`e^{-E}` or minimises E.

Known from the library CBXpy. All particles are evaluated at every step. Closures, runs, ranks, checkpoints, DTensor
parameters, and what happens to losses that are not finite, are as with :class:`~lit_methods.optim.CBO`.
"""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lit_methods.optim.cbo.closures import Evaluate
from lit_methods.optim.cbo.consensus import weighted_mean
from lit_methods.optim.cbo.motion import cloud
from lit_methods.optim.cbo.settings import EffectiveSampleSize, Growing, InitialCloud, former_settings, temperature
from lit_methods.optim.cbo.swarm import ParticleOptimizer

__all__ = ["ConsensusBasedSampling"]


class ConsensusBasedSampling(ParticleOptimizer):
    r"""Particles with covariance noise, which sample :math:`e^{-E}` or minimise E.

    J. A. Carrillo, F. Hoffmann, A. M. Stuart and U. Vaes, "Consensus-based sampling", arXiv 2106.02519. With the
    weighted mean m and covariance C of the particles, weights :math:`\propto e^{-\alpha E}`, a step of length Δt is

    .. math::
        v_i \leftarrow m + e^{-\Delta t} (v_i - m) + \sqrt{(1 - e^{-2 \Delta t}) / \lambda}\; C^{1/2} \xi_i ,

    :math:`\lambda = 1 / (1 + \alpha)` to sample, 1 to optimize. A Gaussian :math:`e^{-E}` is stationary when sampling,
    for any α and Δt, up to terms O(1 / N); others are sampled approximately. The samples are ``particles``; the
    parameters become m. CBXpy takes Euler's step of the same equation, whose stationary law depends on Δt.

    No d x d matrix is made: :math:`\sum_j \sqrt{w_j} (v_j - m)\, \zeta_{ij}` has covariance C. A step costs
    :math:`N^2` normal draws and :math:`2 N^2 d` flops. Steps are unchanged by affine maps of the parameters, but never
    leave the affine hull of the first particles: N > d explores all directions.

    Args:
        params: parameters, named parameters (needed by :func:`~lit_methods.optim.particle_losses`), groups, or a
            module. Parameters that do not require gradients stay as they are.
        lr: time step Δt, >= 0. With 0 neither the particles nor the parameters of a group move.
        num_particles: N of each run, >= 2.
        alpha: inverse temperature of the weights, >= 0; finite for sampling. To optimize, the paper recommends
            :class:`~lit_methods.optim.cbo.EffectiveSampleSize`.
        mode: "sampling" or "optimization", see above.
        init: how the first particles are spread, see :class:`~lit_methods.optim.cbo.InitialCloud`.
        num_runs: independent swarms of ``num_particles`` each, >= 1.
        seed: of the optimizer's own generator, >= 0; None takes one from the global generator.
        process_group: the ranks that work together, None for all. They share the data; particles cannot be shared out.

    Raises:
        ValueError: an argument out of range.
    """

    _shared = (*ParticleOptimizer._shared, "init_std", "init_around_current", "mode")

    @former_settings
    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 0.1,
        num_particles: int = 100,
        alpha: float | Growing | EffectiveSampleSize = 1.0,
        *,
        mode: Literal["sampling", "optimization"] = "sampling",
        init: InitialCloud = InitialCloud(),  # noqa: B008 (frozen)
        num_runs: int = 1,
        seed: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if num_particles < 2:
            raise ValueError(f"num_particles must be >= 2, got {num_particles}")
        defaults = {
            "lr": lr,
            "num_particles": num_particles,
            "num_runs": num_runs,
            **temperature(alpha, default=1.0),
            "init_std": init.std,
            "init_around_current": init.around_current,
            "mode": mode,
        }
        super().__init__(params, defaults, seed, "data", process_group)

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        particles, shared = swarm["particles"], self.param_groups[0]
        losses = self._common_losses(evaluate(particles))
        weights, lowest = self._weigh(losses)
        self._settle(swarm, particles, losses, lowest, weighted_mean(particles, weights))
        center = swarm["consensus"][:, None]
        root = (particles - center).mul_(weights.nan_to_num(0.0).sqrt()[..., None])
        draws = self.noise((*losses.shape, losses.shape[1]), 0.0, 1.0)
        if self.ranks.own_coordinates:
            self.ranks.agree(draws)
        noise = torch.bmm(draws, root, out=torch.empty_like(root))
        heat = 1 + shared["alpha"] if shared["mode"] == "sampling" else 1.0
        for group, part, goal, push in self.layout.parts(particles, center, noise):
            keep = math.exp(-group["lr"])
            torch.lerp(goal, part, keep, out=part)
            part.add_(push, alpha=math.sqrt((1 - keep**2) * heat))

    def _initial(self, current: Tensor, rows: int) -> Tensor:
        return cloud(self, current, rows)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["mode"] not in ("sampling", "optimization"):
            raise ValueError(f"mode must be 'sampling' or 'optimization', got {group['mode']!r}")
        if group["mode"] == "sampling" and not group["alpha"] < math.inf:
            raise ValueError(f"alpha must be finite to sample, got {group['alpha']}; or set mode='optimization'")
        if group["mode"] == "sampling" and group["effective_sample_size"] is not None:
            raise ValueError(
                f"effective_sample_size must be None to sample, got {group['effective_sample_size']}; "
                "or set mode='optimization'"
            )
