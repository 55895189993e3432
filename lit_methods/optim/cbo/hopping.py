r"""Consensus hopping, the bridge in the proof of arXiv 2306.09778 between particles and gradient descent.

A fresh Gaussian cloud of width s is drawn around m at every step, which then is about :math:`-\alpha s^2 \nabla E`.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lit_methods.optim.cbo.closures import Evaluate, Particles
from lit_methods.optim.cbo.settings import EffectiveSampleSize, former_settings, temperature
from lit_methods.optim.cbo.swarm import ParticleOptimizer
from lit_methods.optim.foundation.groups import check_at_least, check_positive

__all__ = ["ConsensusHopping"]


class ConsensusHopping(ParticleOptimizer):
    r"""Consensus hopping: a Gaussian cloud around the parameters, whose consensus point is where it goes next.

    A step draws :math:`v_i = x + s B_i` and sets :math:`x \leftarrow x + lr\,(m - x)`. For small s it is a gradient
    step of length :math:`\tau = \alpha s^2`; for larger ones the proximal step of the same length, which looks across
    barriers of width s. It is :class:`~lit_methods.optim.CBO` with λΔt = 1 and noise that does not depend on the
    place; losses, ranks, checkpoints, memory (``4 N d`` bytes, 8 with float64 parameters) and synchronisations (one a
    step) are the same. ``lr``, ``width`` and its decay belong to parameter groups.

    Args:
        params: parameters, named parameters (needed by :func:`~lit_methods.optim.particle_losses`), groups, or a
            module. Parameters that do not require gradients stay as they
            are. x starts as the parameters.
        lr: share of the way to the consensus point, in [0, 1]; the paper's is 1.
        num_particles: N on all ranks together, >= 2.
        alpha: inverse temperature of the weights, >= 0; infinite takes the best particle.
            :class:`~lit_methods.optim.cbo.EffectiveSampleSize` chooses it anew for every consensus point.
        width: standard deviation s of the cloud, > 0.
        width_decay: s becomes ``width_decay * s`` every ``width_decay_every`` steps, in (0, 1]; 0.98 is the authors'
            "scheduled vanishing".
        width_decay_every: steps from one decay to the next, >= 1.
        num_runs: independent swarms of ``num_particles`` each, >= 1.
        seed: of the optimizer's own generator, >= 0; None takes one from the global generator.
        shard: what the ranks of several processes share out: "data" or "particles".
        process_group: the ranks that work together, None for all.

    Raises:
        ValueError: an argument out of range.
    """

    @former_settings
    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1.0,
        num_particles: int = 200,
        alpha: float | EffectiveSampleSize = 100.0,
        width: float = 0.7,
        *,
        width_decay: float = 1.0,
        width_decay_every: int = 100,
        num_runs: int = 1,
        seed: int | None = None,
        shard: Literal["data", "particles"] = "data",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if num_particles < 2:
            raise ValueError(f"num_particles must be >= 2, got {num_particles}")
        defaults = {
            "lr": lr,
            "num_particles": num_particles,
            "num_runs": num_runs,
            "width": width,
            "width_decay": width_decay,
            "width_decay_every": width_decay_every,
            **temperature(alpha, default=100.0),
        }
        super().__init__(params, defaults, seed, shard, process_group)

    def implicit_gradient(self) -> Particles:
        """Name -> what the last step says of the gradient: ``-(x_k - x_{k-1}) / (lr alpha s^2)``; 0 where it is 0."""
        swarm = self._prepare()
        move = swarm["previous"][swarm["leader"]] - swarm["consensus"][swarm["leader"]]
        for group, part in self.layout.parts(move):
            length = group["lr"] * group["alpha"] * group["width"] ** 2
            part.mul_(1 / length if length else 0.0)
        return self.layout.one(move)

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        steps = swarm["steps"] = swarm.get("steps", 0) + 1
        cloud, start = swarm["particles"], swarm["consensus"]
        self.fill_normal(cloud.flatten(0, 1), 0.0, 1.0)
        for group, part in self.layout.parts(cloud):
            part.mul_(group["width"] if group["lr"] else 0.0)
        cloud.add_(start[:, None])
        point = self._find_consensus(swarm, cloud, self._common_losses(evaluate(cloud)))
        moved = [torch.lerp(old, new, group["lr"]) for group, old, new in self.layout.parts(start, point)]
        swarm["consensus"] = torch.cat(moved, 1)
        for group in self.param_groups:
            if steps % group["width_decay_every"] == 0:
                group["width"] *= group["width_decay"]

    def _initial(self, current: Tensor, rows: int) -> Tensor:
        return current.repeat(rows, 1)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not group["lr"] <= 1:
            raise ValueError(f"lr must be in [0, 1], got {group['lr']}")
        check_positive(width=group["width"])
        if not 0 < group["width_decay"] <= 1:
            raise ValueError(f"width_decay must be in (0, 1], got {group['width_decay']}")
        check_at_least(1, width_decay_every=group["width_decay_every"])
