r"""Consensus-based optimization whose drift is smoothed and scaled as Adam does with gradients.

Known from the library CBXpy. All particles are evaluated at every step. Closures, runs, ranks, checkpoints, DTensor
parameters, and what happens to losses that are not finite, are as with :class:`~lit_methods.optim.CBO`.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lit_methods.optim.cbo.closures import Evaluate
from lit_methods.optim.cbo.motion import check_motion, check_number, cloud
from lit_methods.optim.cbo.settings import EffectiveSampleSize, Growing, InitialCloud, former_settings, temperature
from lit_methods.optim.cbo.swarm import ParticleOptimizer
from lit_methods.optim.foundation.groups import check_positive

__all__ = ["AdamCBO"]


class AdamCBO(ParticleOptimizer):
    r"""Particles whose drift to the consensus point is smoothed and scaled as Adam does with gradients.

    J. Chen, S. Jin and L. Lyu, "A consensus-based global optimization method with adaptive momentum estimation", arXiv
    2012.04827. With :math:`D_i = v_i - m` in place of the gradient,

    .. math::
        p_i \leftarrow \beta_1 p_i + (1 - \beta_1) D_i, \quad q_i \leftarrow \beta_2 q_i + (1 - \beta_2) D_i^2, \quad
        v_i \leftarrow v_i - \lambda \Delta t \frac{\hat p_i}{\sqrt{\hat q_i} + \epsilon}
        + \sigma \sqrt{\Delta t}\, |D_i| \odot B_i

    where hats divide by :math:`1 - \beta^k`. Steps have about the length λΔt in every coordinate, however far m is: let
    ``lr`` fall. This is CBXpy's form, with its ``lamda`` = λΔt (the paper's own text was not at hand). Memory: ``16 N
    d`` bytes with the noise.

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
        betas: how much of the two moments is kept at a step, each in [0, 1).
        eps: ε, > 0.
        init: how the first particles are spread, see :class:`~lit_methods.optim.cbo.InitialCloud`.
        num_runs: independent swarms of ``num_particles`` each, >= 1.
        seed: of the optimizer's own generator, >= 0; None takes one from the global generator.
        shard: what the ranks of several processes share out: "data" or "particles".
        process_group: the ranks that work together, None for all.

    Raises:
        ValueError: an argument out of range.
    """

    _shared = (*ParticleOptimizer._shared, "init_std", "init_around_current")
    _by_particle = ("particles", "first", "second")

    @former_settings
    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 0.1,
        lambda_: float = 1.0,
        sigma: float = 0.4**0.5,
        num_particles: int = 100,
        alpha: float | Growing | EffectiveSampleSize = 50.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
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
            "betas": tuple(betas),
            "eps": eps,
        }
        super().__init__(params, defaults, seed, shard, process_group)

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        particles = swarm["particles"]
        steps = swarm["steps"] = swarm.get("steps", 0) + 1
        center = self._find_consensus(swarm, particles, self._common_losses(evaluate(particles)))[:, None]
        for group, part, first, second, goal in self.layout.parts(*(swarm[k] for k in self._by_particle), center):
            (beta1, beta2), lr = group["betas"], group["lr"]
            away = part - goal
            first.lerp_(away, 1 - beta1)
            second.mul_(beta2).addcmul_(away, away, value=1 - beta2)
            scale = (second / (1 - beta2**steps)).sqrt_().add_(group["eps"])
            part.addcdiv_(first, scale, value=-group["lambda_"] * lr / (1 - beta1**steps))
            part.addcmul_(away, self.noise(part.shape, 0.0, group["sigma"] * lr**0.5))

    def _complete(self, swarm: dict[str, Any]) -> None:
        for key in ("first", "second"):
            self._extend(swarm, key, torch.zeros_like(swarm["particles"]))

    def _initial(self, current: Tensor, rows: int) -> Tensor:
        return cloud(self, current, rows)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_motion(group)
        if not (len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"])):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
        check_positive(eps=group["eps"])
