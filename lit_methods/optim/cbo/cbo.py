r"""Consensus-based optimization and consensus hopping: minimise with loss values only.

Riedl, Klock, Geldhauser and Fornasier, "Gradient is All You Need? How Consensus-Based Optimization can be Interpreted
as a Stochastic Relaxation of Gradient Descent", arXiv 2306.09778. Particles :math:`v_i`, each a value of all
parameters, are drawn to their consensus point and perturbed in proportion to their distance from it:

.. math::
    m = \sum_i w_i v_i, \quad w_i \propto e^{-\alpha E(v_i)}, \qquad
    v_i \leftarrow v_i - \lambda \Delta t\,(v_i - m) + \sigma \sqrt{\Delta t}\; |v_i - m| \odot B_i .

The paper shows that m follows gradient descent with noise that can cross barriers. Consensus hopping, the bridge in its
proof, draws a fresh Gaussian cloud of width s around m: a step is about :math:`-\alpha s^2 \nabla E`.

A normal variable times :math:`|v - m|` has the law of one times :math:`v - m`. So the anisotropic step is
:math:`m + (v - m) \odot Z` with :math:`Z \sim N(1 - \lambda \Delta t, \sigma^2 \Delta t)`: one draw and one ``lerp``.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim.optimizer import ParamsT

from lit_methods.optim.cbo.swarm import Evaluate, Losses, ParticleOptimizer, Particles
from lit_methods.optim.foundation.flat import is_dtensor

__all__ = ["CBO", "ConsensusHopping", "particle_losses"]


class CBO(ParticleOptimizer):
    r"""Consensus-based optimization of the parameters of any model, without gradients.

    One step with ``particle_batch_size`` b: the N particles are permuted and cut into batches of b. For each batch the
    losses of its particles give a consensus point m, and all particles (``update="partial"``: the batch's) move to it.
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
        params: parameters, named parameters (needed by :func:`particle_losses`), groups, or a module. Parameters that
            do not require gradients stay as they are.
        lr: time step Δt, >= 0. With 0 neither the particles nor the parameters of a group move.
        lambda_: strength of the drift λ, > 0. ``lambda_ * lr = 1`` forgets the particles' places.
        sigma: strength of the noise σ, >= 0.
        num_particles: N on all ranks together, >= 1; a single one never moves.
        alpha: inverse temperature of the weights, >= 0; infinite takes the best particle.
        noise: "anisotropic" perturbs each coordinate by its own distance, which suits any dimension; "isotropic" all by
            the norm.
        particle_batch_size: particles to a consensus point, or None for all. Lowered to a divisor of ``num_particles``.
        update: which particles a batch's consensus point moves.
        init_std: standard deviation of the first particles, > 0, around 0 or, with ``init_around_current``, around the
            parameters.
        init_around_current: see ``init_std``.
        stall_tol: when no coordinate of the consensus point has moved further at the end of a step, all particles get
            noise :math:`\sigma \sqrt{\Delta t} N(0, I)`; 0 for never.
        effective_sample_size: instead of a fixed ``alpha``, take for every consensus point the one whose weights count
            as this share of the particles, in (0, 1). An extension known from CBXpy.
        gradient_drift: γ >= 0 of a further drift :math:`-\gamma \Delta t\, \nabla E`, at the place reached. By autograd
            where the losses allow it, else by central differences, which cost 2 d losses for each particle.
        alpha_growth: ``alpha`` is multiplied by it after every step, > 0; 1.05 is CBXpy's schedule. To cool once in a
            while, and sigma too, see :class:`~lit_methods.callbacks.CBOCooling`.
        num_runs: independent swarms of ``num_particles`` each, >= 1.
        seed: of the optimizer's own generator; None takes one from the global generator.
        shard: see above.
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
        "alpha_growth",
    )
    _further: Mapping[str, Any] = MappingProxyType({})  # what a subclass adds to the defaults

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 0.1,
        lambda_: float = 1.0,
        sigma: float = 0.4**0.5,
        num_particles: int = 100,
        alpha: float = 50.0,
        *,
        noise: Literal["anisotropic", "isotropic"] = "anisotropic",
        particle_batch_size: int | None = 10,
        update: Literal["full", "partial"] = "full",
        init_std: float = 1.0,
        init_around_current: bool = False,
        stall_tol: float = 1e-5,
        effective_sample_size: float | None = None,
        gradient_drift: float = 0.0,
        alpha_growth: float = 1.0,
        num_runs: int = 1,
        seed: int | None = None,
        shard: Literal["data", "particles"] = "data",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles must be >= 1, got {num_particles}")
        if num_particles == 1:
            warnings.warn("num_particles=1: a single particle is its own consensus point and never moves")
        if particle_batch_size is not None and particle_batch_size < 1:
            raise ValueError(f"particle_batch_size must be >= 1, or None for all particles, got {particle_batch_size}")
        if particle_batch_size is not None:
            particle_batch_size = _divisor(num_particles, particle_batch_size)
        defaults = {
            "lr": lr,
            "lambda_": lambda_,
            "sigma": sigma,
            "num_particles": num_particles,
            "num_runs": num_runs,
            "alpha": alpha,
            "noise": noise,
            "particle_batch_size": particle_batch_size,
            "update": update,
            "init_std": init_std,
            "init_around_current": init_around_current,
            "stall_tol": stall_tol,
            "effective_sample_size": effective_sample_size,
            "gradient_drift": gradient_drift,
            "alpha_growth": alpha_growth,
            **self._further,
        }
        super().__init__(params, defaults, seed, shard, process_group)

    def implicit_gradient(self, tau: float) -> Particles:
        """Name -> what the last move of the consensus says of the gradient: ``-(m_k - m_{k-1}) / tau``.

        Args:
            tau: length of the implied gradient step, > 0; with all particles near m about alpha times their variance.
        """
        if not tau > 0:
            raise ValueError(f"tau must be > 0, got {tau}")
        swarm = self._prepare()
        leader = swarm["leader"]
        return self._layout.one((swarm["previous"][leader] - swarm["consensus"][leader]) / tau)

    def reduce_particles(self, num_particles: int) -> None:
        """Go on with fewer particles: the first ones, which are as good as any.

        Args:
            num_particles: from 1 to the present number.
        """
        if not 1 <= num_particles <= self.num_particles:
            raise ValueError(f"num_particles must be in [1, {self.num_particles}], got {num_particles}")
        swarm = self._prepare()
        for key in (*self._by_particle, *self._losses_by_particle):
            swarm[key] = swarm[key][:, : self._ranks.local(num_particles)].clone()
        batch = self.param_groups[0]["particle_batch_size"]
        self._set_shared("num_particles", num_particles)
        self._set_shared("particle_batch_size", None if batch is None else _divisor(num_particles, batch))

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        shared, particles = self.param_groups[0], swarm["particles"]
        runs, number, dim = particles.shape
        size = self._ranks.local(shared["particle_batch_size"] or self.num_particles)
        if size == number:
            losses = self._common_losses(evaluate(particles))
            self._move(particles, self._find_consensus(swarm, particles, losses)[:, None], evaluate)
        else:
            order = torch.randperm(number, generator=self._generator, device=particles.device)
            if self._ranks.own_coordinates:
                self._ranks.agree(order)
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
        if any(stalled):
            self._shake(particles, stalled)
        if shared["alpha_growth"] != 1:
            self._set_shared("alpha", shared["alpha"] * shared["alpha_growth"])

    def _move(self, points: Tensor, center: Tensor, evaluate: Evaluate) -> None:
        """Drift to ``center`` and noise, in place, then the gradient's drift; a group with ``lr=0`` stays as it is.

        Args:
            points: ``(runs, n, d)``.
            center: ``(runs, 1, d)``, or ``(runs, n, d)`` for a consensus point of each particle's own.
            evaluate: for the gradient.
        """
        isotropic = self.param_groups[0]["noise"] == "isotropic"
        distance = self._ranks.norm(points - center) if isotropic else None
        for group, part, goal in self._layout.parts(points, center):
            drift, spread = 1 - group["lambda_"] * group["lr"], group["sigma"] * group["lr"] ** 0.5
            if distance is None:
                torch.lerp(goal, part, self._noise(part.shape, drift, spread), out=part)
            else:
                noise = self._noise(part.shape, 0.0, spread)
                torch.lerp(goal, part, drift, out=part)
                part.addcmul_(noise, distance)
        if self.param_groups[0]["gradient_drift"]:
            gradient = self._ranks.mean_over_data(_gradient(points, evaluate))
            for group, part, slope in self._layout.parts(points, gradient):
                part.sub_(slope, alpha=group["gradient_drift"] * group["lr"])

    def _shake(self, particles: Tensor, stalled: list[bool]) -> None:
        """Restart the runs whose consensus stands still."""
        chosen = torch.tensor(stalled, device=particles.device)[:, None, None]
        for group, part in self._layout.parts(particles):
            part.add_(self._noise(part.shape, 0.0, group["sigma"] * group["lr"] ** 0.5).mul_(chosen))

    def _initial(self, current: Tensor, rows: int) -> Tensor:
        shared = self.param_groups[0]
        points = current.new_empty(rows, len(current))
        self._fill_normal(points, 0.0, shared["init_std"])
        return points.add_(current) if shared["init_around_current"] else points

    def _warn_of_divergence(self, dim: int) -> None:
        group = self.param_groups[0]
        others = dim - 1 if group["noise"] == "isotropic" else 0
        variance = group["sigma"] ** 2 * group["lr"]
        normal = torch.linspace(-6, 6, 2001, dtype=torch.float64)
        stretch = (1 - group["lambda_"] * group["lr"] + variance**0.5 * normal).square() + variance * others
        density = torch.exp(-normal.square() / 2)
        if (density * stretch.clamp(min=1e-30).log()).sum() > 1e-9:
            warnings.warn(
                f"with sigma={group['sigma']:g}, lr={group['lr']:g}, lambda_={group['lambda_']:g} and {group['noise']} "
                f"noise in {dim} dimensions the particles run away from their consensus; lower sigma"
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["noise"] not in ("anisotropic", "isotropic"):
            raise ValueError(f"noise must be 'anisotropic' or 'isotropic', got {group['noise']!r}")
        if group["update"] not in ("full", "partial"):
            raise ValueError(f"update must be 'full' or 'partial', got {group['update']!r}")
        for name in ("lambda_", "init_std", "alpha_growth"):
            if not 0 < group[name] < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {group[name]}")
        for name in ("sigma", "stall_tol", "gradient_drift"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {group[name]}")
        if group["gradient_drift"] and any(is_dtensor(p) for p in group["params"]):
            raise ValueError(f"gradient_drift must be 0 with DTensor parameters (FSDP2), got {group['gradient_drift']}")


class ConsensusHopping(ParticleOptimizer):
    r"""Consensus hopping: a Gaussian cloud around the parameters, whose consensus point is where it goes next.

    A step draws :math:`v_i = x + s B_i` and sets :math:`x \leftarrow x + lr\,(m - x)`. For small s it is a gradient
    step of length :math:`\tau = \alpha s^2`; for larger ones the proximal step of the same length, which looks across
    barriers of width s. It is :class:`CBO` with λΔt = 1 and noise that does not depend on the place. Losses, ranks,
    checkpoints, memory and synchronisations are as there. ``lr``, ``width`` and its decay belong to parameter groups.

    Args:
        params: as in :class:`CBO`; x starts as the parameters.
        lr: share of the way to the consensus point, in [0, 1]; the paper's is 1.
        num_particles: N on all ranks together, >= 2.
        alpha: inverse temperature of the weights, >= 0.
        width: standard deviation s of the cloud, > 0.
        width_decay: s becomes ``width_decay * s`` every ``width_decay_every`` steps, in (0, 1]; 0.98 is the authors'
            "scheduled vanishing".
        width_decay_every: see ``width_decay``, >= 1.
        effective_sample_size: as in :class:`CBO`.
        num_runs: as in :class:`CBO`.
        seed: as in :class:`CBO`.
        shard: as in :class:`CBO`.
        process_group: as in :class:`CBO`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1.0,
        num_particles: int = 200,
        alpha: float = 100.0,
        width: float = 0.7,
        *,
        width_decay: float = 1.0,
        width_decay_every: int = 100,
        effective_sample_size: float | None = None,
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
            "alpha": alpha,
            "width": width,
            "width_decay": width_decay,
            "width_decay_every": width_decay_every,
            "effective_sample_size": effective_sample_size,
        }
        super().__init__(params, defaults, seed, shard, process_group)

    def implicit_gradient(self) -> Particles:
        """Name -> what the last step says of the gradient: ``-(x_k - x_{k-1}) / (lr alpha s^2)``; 0 where it is 0."""
        swarm = self._prepare()
        move = swarm["previous"][swarm["leader"]] - swarm["consensus"][swarm["leader"]]
        for group, part in self._layout.parts(move):
            length = group["lr"] * group["alpha"] * group["width"] ** 2
            part.mul_(1 / length if length else 0.0)
        return self._layout.one(move)

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        steps = swarm["steps"] = swarm.get("steps", 0) + 1
        cloud, start = swarm["particles"], swarm["consensus"]
        self._fill_normal(cloud.flatten(0, 1), 0.0, 1.0)
        for group, part in self._layout.parts(cloud):
            part.mul_(group["width"] if group["lr"] else 0.0)
        cloud.add_(start[:, None])
        point = self._find_consensus(swarm, cloud, self._common_losses(evaluate(cloud)))
        moved = [torch.lerp(old, new, group["lr"]) for group, old, new in self._layout.parts(start, point)]
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
        if not 0 < group["width"] < math.inf:
            raise ValueError(f"width must be > 0 and finite, got {group['width']}")
        if not 0 < group["width_decay"] <= 1:
            raise ValueError(f"width_decay must be in (0, 1], got {group['width_decay']}")
        if group["width_decay_every"] < 1:
            raise ValueError(f"width_decay_every must be >= 1, got {group['width_decay_every']}")


def particle_losses(
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    chunk_size: int | None = None,
) -> Losses:
    """The closure that a step of :class:`CBO` wants: every particle's loss on one batch of ``(x, y)``, in one call.

    The module runs once for all particles (``vmap`` over ``functional_call``). What the particles do not hold, frozen
    parameters and buffers, is the module's own. Batch normalisation in training mode takes the batch's statistics and
    leaves the running ones alone; dropout is drawn anew for each particle, from the global generator.

    Args:
        module: maps ``x`` to outputs. The optimizer must have its ``named_parameters()``.
        loss: maps (outputs, ``y``) to a scalar.
        batch: ``(x, y)``.
        chunk_size: how many particles run at a time, to save memory; None for all.

    Returns:
        A function of the particles, name -> ``(n, *shape)``, to their losses ``(n,)``.

    Raises:
        ValueError: from the function: the particles have names that the module does not know.
    """
    x, y = batch
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    moving = _running_statistics(module)

    def loss_of_one(particle: Particles, statistics: Particles) -> Tensor:
        return loss(functional_call(module, {**particle, **statistics}, (x,)), y)

    run = vmap(loss_of_one, randomness="different", chunk_size=chunk_size)

    def losses(particles: Particles) -> Tensor:
        if not particles.keys() <= known:
            raise ValueError(
                f"the module has no parameters {sorted(particles.keys() - known)}: build the optimizer of its "
                "named_parameters()"
            )
        number = len(next(iter(particles.values())))
        return run(particles, {name: b.expand(number, *b.shape).clone() for name, b in moving.items()})

    return losses


def _running_statistics(module: nn.Module) -> Particles:
    """Buffers that a forward pass in training mode changes: each particle needs its own, to be thrown away."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.training and layer.track_running_stats
        for name, buffer in layer.named_buffers(recurse=False)
    }


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


def _divisor(number: int, wanted: int) -> int:
    """The largest divisor of ``number`` up to ``wanted``; a warning when that is less than both."""
    divisor = next(k for k in range(min(wanted, number), 0, -1) if number % k == 0)
    if divisor < min(wanted, number):
        warnings.warn(f"particle_batch_size={wanted} does not divide num_particles={number}; using {divisor}")
    return divisor
