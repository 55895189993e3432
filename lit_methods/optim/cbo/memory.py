r"""Consensus-based optimization with memory: particles are drawn to the best place they have been at, too.

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
from lit_methods.optim.cbo.motion import check_motion, check_number, cloud, warn_of_divergence
from lit_methods.optim.cbo.settings import EffectiveSampleSize, Growing, InitialCloud, former_settings, temperature
from lit_methods.optim.cbo.swarm import ParticleOptimizer

__all__ = ["MemoryCBO"]


class MemoryCBO(ParticleOptimizer):
    r"""Particles that remember the best place they have been at, and are drawn to it as well.

    S. Grassi and L. Pareschi, "From particle swarm optimization to consensus based optimization", 2021, and K. Riedl,
    "Leveraging memory effects and gradient information in consensus-based optimisation", arXiv 2211.12184. With
    :math:`y_i` the place of particle i with the lowest loss so far and m the weighted mean of these,

    .. math::
        v_i \leftarrow v_i - \lambda \Delta t\,(v_i - m) - \lambda_m \Delta t\,(v_i - y_i)
        + \sigma \sqrt{\Delta t}\,|v_i - m| \odot B_i + \sigma_m \sqrt{\Delta t}\,|v_i - y_i| \odot B'_i .

    Losses are compared over time: they should be of the same function. On changing data batches a lucky batch is
    remembered. The step's loss is the lowest remembered one, so that a step without any finite loss is not skipped but
    goes on with what is remembered. CBXpy draws to :math:`y_i` in a step of its own, after
    that to m. Memory: ``12 N d`` bytes with the noise. The gradient's drift of the paper is left out.

    Args:
        params: parameters, named parameters (needed by :func:`~lit_methods.optim.particle_losses`), groups, or a
            module. Parameters that do not require gradients stay as they are.
        lr: time step Δt, >= 0. With 0 neither the particles nor the parameters of a group move.
        lambda_: strength of the drift λ, > 0.
        sigma: strength of the noise σ, >= 0.
        num_particles: N on all ranks together, >= 1; a single one never moves.
        alpha: inverse temperature of the weights, >= 0; infinite takes the best particle.
            :class:`~lit_methods.optim.cbo.Growing` raises it with every step,
            :class:`~lit_methods.optim.cbo.EffectiveSampleSize` chooses it anew for every consensus point.
        lambda_memory: strength :math:`\lambda_m` of the drift to the remembered place, >= 0.
        sigma_memory: strength :math:`\sigma_m` of its noise, >= 0; None for ``lambda_memory * sigma``, as it then is.
        init: how the first particles are spread, see :class:`~lit_methods.optim.cbo.InitialCloud`.
        num_runs: independent swarms of ``num_particles`` each, >= 1.
        seed: of the optimizer's own generator, >= 0; None takes one from the global generator.
        shard: what the ranks of several processes share out: "data" or "particles".
        process_group: the ranks that work together, None for all.

    Raises:
        ValueError: an argument out of range.
    """

    _shared = (*ParticleOptimizer._shared, "init_std", "init_around_current")
    _by_particle = ("particles", "memory")
    _losses_by_particle = ("memory_losses",)

    @former_settings
    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 0.1,
        lambda_: float = 1.0,
        sigma: float = 0.4**0.5,
        num_particles: int = 100,
        alpha: float | Growing | EffectiveSampleSize = 50.0,
        lambda_memory: float = 0.4,
        sigma_memory: float | None = None,
        *,
        init: InitialCloud = InitialCloud(),  # noqa: B008 (frozen)
        num_runs: int = 1,
        seed: int | None = None,
        shard: Literal["data", "particles"] = "data",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_number(num_particles)
        defaults = {
            "lr": lr,
            "lambda_": lambda_,
            "sigma": sigma,
            "num_particles": num_particles,
            "num_runs": num_runs,
            **temperature(alpha, default=50.0),
            "noise": "anisotropic",
            "init_std": init.std,
            "init_around_current": init.around_current,
            "lambda_memory": lambda_memory,
            "sigma_memory": sigma_memory,
        }
        super().__init__(params, defaults, seed, shard, process_group)

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        particles, memory = swarm["particles"], swarm["memory"]
        losses = self._common_losses(evaluate(particles))
        better = losses < swarm["memory_losses"]
        torch.where(better[..., None], particles, memory, out=memory)
        swarm["memory_losses"] = torch.minimum(losses, swarm["memory_losses"])
        center = self._find_consensus(swarm, memory, swarm["memory_losses"])[:, None]
        for group, part, best, goal in self.layout.parts(particles, memory, center):
            root = group["lr"] ** 0.5
            sigma = group["sigma_memory"]
            sigma = group["lambda_memory"] * group["sigma"] if sigma is None else sigma
            away = part - best
            noise = self.noise(part.shape, 1 - group["lambda_"] * group["lr"], group["sigma"] * root)
            torch.lerp(goal, part, noise, out=part)
            part.addcmul_(away, self.noise(part.shape, -group["lambda_memory"] * group["lr"], sigma * root))

    def _complete(self, swarm: dict[str, Any]) -> None:
        particles = swarm["particles"]
        if "memory" not in swarm or swarm["memory"].shape != particles.shape:
            # Old losses were computed with fewer coordinates, so forget them.
            swarm["memory_losses"] = particles.new_full(particles.shape[:2], math.inf)
        self._extend(swarm, "memory", particles)

    def _initial(self, current: Tensor, rows: int) -> Tensor:
        return cloud(self, current, rows)

    def _warn(self, dim: int) -> None:
        warn_of_divergence(self.param_groups[0], dim)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_motion(group)
        for name in ("lambda_memory", "sigma_memory"):
            if group[name] is not None and not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {group[name]}")
