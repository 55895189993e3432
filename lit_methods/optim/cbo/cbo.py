r"""Consensus-based optimization: minimise with loss values only.

Riedl, Klock, Geldhauser and Fornasier, "Gradient is All You Need? How Consensus-Based Optimization can be Interpreted
as a Stochastic Relaxation of Gradient Descent", arXiv 2306.09778. Particles :math:`v_i`, each a value of all
parameters, are drawn to their consensus point and perturbed in proportion to their distance from it:

.. math::
    m = \sum_i w_i v_i, \quad w_i \propto e^{-\alpha E(v_i)}, \qquad
    v_i \leftarrow v_i - \lambda \Delta t\,(v_i - m) + \sigma \sqrt{\Delta t}\; |v_i - m| \odot B_i .

The paper shows that m follows gradient descent with noise that can cross barriers.

A normal variable times :math:`|v - m|` has the law of one times :math:`v - m`. So the anisotropic step is
:math:`m + (v - m) \odot Z` with :math:`Z \sim N(1 - \lambda \Delta t, \sigma^2 \Delta t)`: one draw and one ``lerp``.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lit_methods.optim.cbo.closures import Evaluate, Particles
from lit_methods.optim.cbo.motion import check_motion, check_number, cloud, move, warn_of_divergence
from lit_methods.optim.cbo.settings import (
    EffectiveSampleSize,
    Growing,
    InitialCloud,
    ParticleBatches,
    divisor,
    former_settings,
    temperature,
)
from lit_methods.optim.cbo.swarm import ParticleOptimizer
from lit_methods.optim.foundation.flat import is_dtensor
from lit_methods.optim.foundation.groups import check_nonnegative, check_positive

__all__ = ["CBO"]


class CBO(ParticleOptimizer):
    r"""Consensus-based optimization of the parameters of any model, without gradients.

    One step with ``batches=ParticleBatches(b)``: the N particles are permuted and cut into batches of b. For each batch
    the losses of its particles give a consensus point m, and all particles (``update="partial"``: the batch's) move to
    it.
    So every particle is evaluated once a step, on the same data. Then the parameters become m. The rates ``lr``,
    ``lambda_`` and ``sigma`` belong to parameter groups; all else is common to all.

    Particles contract in the mean square if :math:`(1 - \lambda \Delta t)^2 + \sigma^2 \Delta t < 1`, with isotropic
    noise :math:`\sigma^2 \Delta t\, d`; almost surely for rather larger sigma. A warning says when they will not.

    The particles are the state: weights written into the model from elsewhere have no effect on later steps.

    Memory: ``4 N d`` bytes (8 with float64 parameters) and as much for the noise. Particles are float32 also for lower
    precision parameters, which get the rounded consensus. Time beyond the losses: N d normal draws for each particle
    batch. Host synchronisations: one a step, for ``stall_tol`` and to find that losses or particles are not finite. A
    particle whose loss is not finite has weight 0.

    Several processes: ``shard="data"`` keeps the same particles on all ranks and averages the losses, one number for
    each particle, of each rank's own data. ``shard="particles"`` splits the particles; all ranks must then see the same
    data (:class:`~lit_methods.black_box.CBOModule` gathers it). They exchange the losses and d numbers for each
    consensus point, which is identical on all ranks.

    DTensor parameters (FSDP2, all of them sharded over all ranks): a rank holds its columns of all particles, so that
    their memory is shared out too; only losses, and with isotropic noise one norm for each particle, are exchanged. The
    closure is the one of other optimizers, and every particle costs an all-gather of the parameters. Its loss must run
    backward, as Lightning's automatic optimization does, or the module be sharded with
    ``reshard_after_forward=True``: else FSDP2 keeps what it gathered for the particle before. Needs ``shard="data"``
    and no ``gradient_drift``.

    Several runs: ``num_runs`` swarms that know nothing of each other, in one array. The closure gets the particles of
    all as ``num_runs * n`` rows. The parameters become the consensus point of the run with the lowest loss in the step;
    :meth:`consensus_of_runs` and :meth:`best_losses` tell of all.

    Args:
        params: parameters, named parameters (needed by :func:`~lit_methods.optim.particle_losses`), groups, or a
            module. Parameters that do not require gradients stay as they are.
        lr: time step Δt, >= 0. With 0 neither the particles nor the parameters of a group move.
        lambda_: strength of the drift λ, > 0. ``lambda_ * lr = 1`` forgets the particles' places.
        sigma: strength of the noise σ, >= 0.
        num_particles: N on all ranks together, >= 1; a single one never moves.
        alpha: inverse temperature of the weights, >= 0; infinite takes the best particle.
            :class:`~lit_methods.optim.cbo.Growing` raises it with every step,
            :class:`~lit_methods.optim.cbo.EffectiveSampleSize` chooses it anew for every consensus point.
        noise: "anisotropic" perturbs each coordinate by its own distance, which suits any dimension; "isotropic" all by
            the norm.
        batches: which particles make a consensus point together, and which it moves.
        init: how the first particles are spread, see :class:`~lit_methods.optim.cbo.InitialCloud`.
        stall_tol: when no coordinate of the consensus point has moved further at the end of a step, all particles get
            noise :math:`\sigma \sqrt{\Delta t} N(0, I)`; 0 for never.
        gradient_drift: γ >= 0 of a further drift :math:`-\gamma \Delta t\, \nabla E`, at the place reached. By autograd
            where the losses allow it, else by central differences, which cost 2 d losses for each particle.
        num_runs: independent swarms of ``num_particles`` each, >= 1.
        seed: of the optimizer's own generator, >= 0; None takes one from the global generator.
        shard: what the ranks of several processes share out: "data" or "particles". See above.
        process_group: the ranks that work together, None for all.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = CBO(model, num_particles=50)
        >>> batch = torch.randn(8, 4), torch.randint(2, (8,))
        >>> loss = optimizer.step(particle_losses(model, torch.nn.functional.cross_entropy, batch))
    """

    _shared = (
        *ParticleOptimizer._shared,
        "noise",
        "particle_batch_size",
        "update",
        "init_std",
        "init_around_current",
        "stall_tol",
        "gradient_drift",
    )

    @former_settings
    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 0.1,
        lambda_: float = 1.0,
        sigma: float = 0.4**0.5,
        num_particles: int = 100,
        alpha: float | Growing | EffectiveSampleSize = 50.0,
        *,
        noise: Literal["anisotropic", "isotropic"] = "anisotropic",
        batches: ParticleBatches = ParticleBatches(),  # noqa: B008 (frozen)
        init: InitialCloud = InitialCloud(),  # noqa: B008 (frozen)
        stall_tol: float = 1e-5,
        gradient_drift: float = 0.0,
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
            "noise": noise,
            "particle_batch_size": None if batches.size is None else divisor(num_particles, batches.size),
            "update": batches.update,
            "init_std": init.std,
            "init_around_current": init.around_current,
            "stall_tol": stall_tol,
            "gradient_drift": gradient_drift,
        }
        super().__init__(params, defaults, seed, shard, process_group)

    def implicit_gradient(self, tau: float) -> Particles:
        """Name -> what the last move of the consensus says of the gradient: ``-(m_k - m_{k-1}) / tau``.

        Args:
            tau: length of the implied gradient step, > 0; with all particles near m about alpha times their variance.
        """
        check_positive(tau=tau)
        swarm = self._prepare()
        leader = swarm["leader"]
        return self.layout.one((swarm["previous"][leader] - swarm["consensus"][leader]) / tau)

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        shared, particles = self.param_groups[0], swarm["particles"]
        runs, number, dim = particles.shape
        size = self.ranks.local(shared["particle_batch_size"] or self.num_particles)
        if size == number:
            losses = self._common_losses(evaluate(particles))
            self._move(particles, self._find_consensus(swarm, particles, losses)[:, None], evaluate)
        else:
            order = torch.randperm(number, generator=self._generator, device=particles.device)
            if self.ranks.own_coordinates:
                self.ranks.agree(order)
            batch = self._buffer("batch", runs * size, dim).view(runs, size, dim)
            for start in range(0, number, size):
                rows = order[start : start + size]
                torch.index_select(particles, 1, rows, out=batch)
                losses = self._common_losses(evaluate(batch))
                center = self._find_consensus(swarm, batch, losses, last=start + size == number)[:, None]
                if shared["update"] == "full":
                    self._move(particles, center, evaluate)
                else:
                    self._move(batch, center, evaluate)
                    particles.index_copy_(1, rows, batch)
        stalled = [change < shared["stall_tol"] for change in self._changes]
        if any(stalled) and self.num_particles > 1:
            self._shake(particles, stalled)

    def _move(self, points: Tensor, center: Tensor, evaluate: Evaluate) -> None:
        """Drift and noise, in place, then the gradient's drift."""
        move(self, points, center)
        if self.param_groups[0]["gradient_drift"]:
            gradient = self.ranks.mean_over_data(_gradient(points, evaluate))
            for group, part, slope in self.layout.parts(points, gradient):
                part.sub_(slope, alpha=group["gradient_drift"] * group["lr"])

    def _shake(self, particles: Tensor, stalled: list[bool]) -> None:
        """Restart the runs whose consensus stands still."""
        chosen = torch.tensor(stalled, device=particles.device)[:, None, None]
        for group, part in self.layout.parts(particles):
            part.add_(self.noise(part.shape, 0.0, group["sigma"] * group["lr"] ** 0.5).mul_(chosen))

    def _initial(self, current: Tensor, rows: int) -> Tensor:
        return cloud(self, current, rows)

    def _warn(self, dim: int) -> None:
        warn_of_divergence(self.param_groups[0], dim)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_motion(group)
        check_nonnegative(stall_tol=group["stall_tol"], gradient_drift=group["gradient_drift"])
        if group["gradient_drift"] and any(is_dtensor(p) for p in group["params"]):
            raise ValueError(f"gradient_drift must be 0 with DTensor parameters (FSDP2), got {group['gradient_drift']}")


def _gradient(points: Tensor, evaluate: Evaluate, step: float = 1e-3) -> Tensor:
    """Gradients of the losses at ``points`` (runs, n, d), 0 where they are not finite."""
    leaf = points.detach().clone().requires_grad_()
    with torch.enable_grad():
        losses = evaluate(leaf)
        if losses.requires_grad:
            return torch.autograd.grad(losses.sum(), leaf)[0].nan_to_num_(0.0, 0.0, 0.0)
    gradient, moved = torch.empty_like(points), points.clone()
    for j in range(points.shape[-1]):
        values = []
        for side in (step, -step):
            moved[..., j] = points[..., j] + side
            values.append(evaluate(moved))
        moved[..., j] = points[..., j]
        gradient[..., j] = (values[0] - values[1]) / (2 * step)
    return gradient.nan_to_num_(0.0, 0.0, 0.0)
