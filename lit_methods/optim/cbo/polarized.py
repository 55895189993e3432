r"""Polarized consensus-based optimization: a consensus point for every particle, so that several minima are found.

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
from lit_methods.optim.cbo.consensus import consensus_logits
from lit_methods.optim.cbo.motion import check_motion, check_number, cloud, move, warn_of_divergence
from lit_methods.optim.cbo.settings import Growing, InitialCloud, former_settings, temperature
from lit_methods.optim.cbo.swarm import ParticleOptimizer

__all__ = ["PolarizedCBO"]


class PolarizedCBO(ParticleOptimizer):
    r"""Every particle has a consensus point of its own, so that several minima can be found at once.

    L. Bungert, T. Roith and P. Wacker, "Polarized consensus-based dynamics for optimization and sampling", arXiv
    2211.05238. Particle i drifts to, and gets noise in proportion to its distance from,

    .. math::
        m_i = \frac{\sum_j w_{ij} v_j}{\sum_j w_{ij}}, \qquad
        w_{ij} = e^{-|v_i - v_j|^2 / (2 \kappa^2)}\, e^{-\alpha E(v_j)} ,

    the mean of the good particles near it; with :math:`\kappa \to \infty` it is :class:`~lit_methods.optim.CBO`. The
    particles end at the minima. The parameters become the consensus point of the particle with the lowest loss. CBXpy
    also has other kernels, and by default takes the exponent of the kernel times α: there
    :math:`\kappa / \sqrt{\alpha}` is our κ.

    Time: :math:`4 N^2 d` flops more than :class:`~lit_methods.optim.CBO`. The distances are exact up to rounding in
    proportion to the squared spread of all particles.

    Args:
        params: parameters, named parameters (needed by :func:`~lit_methods.optim.particle_losses`), groups, or a
            module. Parameters that do not require gradients stay as they are.
        lr: time step Δt, >= 0. With 0 neither the particles nor the parameters of a group move.
        lambda_: strength of the drift λ, > 0.
        sigma: strength of the noise σ, >= 0.
        num_particles: N on all ranks together, >= 1; a single one never moves.
        alpha: inverse temperature of the weights, >= 0. :class:`~lit_methods.optim.cbo.Growing` raises it with every
            step.
        kappa: how far a particle sees, > 0, in units of the Euclidean distance of all parameters; infinite for all.
        noise: "anisotropic" perturbs each coordinate by its own distance, which suits any dimension; "isotropic" all by
            the norm.
        init: how the first particles are spread, see :class:`~lit_methods.optim.cbo.InitialCloud`.
        num_runs: independent swarms of ``num_particles`` each, >= 1.
        seed: of the optimizer's own generator, >= 0; None takes one from the global generator.
        process_group: the ranks that work together, None for all. They share the data; particles cannot be shared out.

    Raises:
        ValueError: an argument out of range.
    """

    _shared = (*ParticleOptimizer._shared, "noise", "init_std", "init_around_current", "kappa")

    @former_settings
    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 0.1,
        lambda_: float = 1.0,
        sigma: float = 0.4**0.5,
        num_particles: int = 100,
        alpha: float | Growing = 50.0,
        kappa: float = 1.0,
        *,
        noise: Literal["anisotropic", "isotropic"] = "anisotropic",
        init: InitialCloud = InitialCloud(),  # noqa: B008 (frozen)
        num_runs: int = 1,
        seed: int | None = None,
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
            "noise": noise,
            "init_std": init.std,
            "init_around_current": init.around_current,
            "kappa": kappa,
        }
        super().__init__(params, defaults, seed, "data", process_group)

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        particles, shared = swarm["particles"], self.param_groups[0]
        losses = self._common_losses(evaluate(particles))
        lowest = losses.amin(1)
        logits = consensus_logits(losses, shared["alpha"], lowest)[:, None]
        weights = (logits - self._squared_distances(particles) / (2 * shared["kappa"] ** 2)).softmax(2)
        centers = torch.bmm(weights, particles, out=torch.empty_like(particles))
        best = centers.take_along_dim(losses.argmin(1)[:, None, None], 1)[:, 0]
        self._settle(swarm, particles, losses, lowest, best)
        known = (lowest < math.inf)[:, None, None]
        move(self, particles, torch.where(known, centers, swarm["consensus"][:, None]))

    def _squared_distances(self, particles: Tensor) -> Tensor:
        """``(runs, n, n)``, over all coordinates."""
        runs, number, _ = particles.shape
        x = particles - particles.mean(1, keepdim=True)
        products = torch.bmm(x, x.mT, out=x.new_empty(runs, number, number))
        if self.ranks.own_coordinates:
            dist.all_reduce(products, group=self.ranks.group)
        squares = products.diagonal(dim1=1, dim2=2)
        return (squares[:, None] + squares[:, :, None] - 2 * products).clamp_(min=0)

    def _initial(self, current: Tensor, rows: int) -> Tensor:
        return cloud(self, current, rows)

    def _warn(self, dim: int) -> None:
        warn_of_divergence(self.param_groups[0], dim)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_motion(group)
        if not group["kappa"] > 0:
            raise ValueError(f"kappa must be > 0, got {group['kappa']}")
