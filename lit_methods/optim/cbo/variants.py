r"""Kin of consensus-based optimization: other noise, memory, several consensus points, adaptive moments.

Extensions of :class:`~lit_methods.optim.CBO`, known from the library CBXpy. Each evaluates all particles at every step.
Closures, runs, ranks, checkpoints, DTensor parameters, and what happens to losses that are not finite, are as there.
"""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lit_methods.optim.cbo.cbo import CBO
from lit_methods.optim.cbo.consensus import consensus_logits, weighted_mean
from lit_methods.optim.cbo.swarm import Evaluate

__all__ = ["AdamCBO", "ConsensusBasedSampling", "MemoryCBO", "PolarizedCBO"]


class ConsensusBasedSampling(CBO):
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
        params: as in :class:`CBO`.
        lr: time step Δt, >= 0.
        num_particles: N of each run, >= 2.
        alpha: inverse temperature of the weights, >= 0; finite for sampling.
        mode: see above.
        init_std: as in :class:`CBO`.
        init_around_current: as in :class:`CBO`.
        effective_sample_size: as in :class:`CBO`; only to optimize, where the paper recommends it.
        num_runs: as in :class:`CBO`.
        seed: as in :class:`CBO`.
        process_group: as in :class:`CBO`. Ranks share the data; particles cannot be shared out.

    Raises:
        ValueError: an argument out of range.
    """

    _shared = (*CBO._shared, "mode")

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 0.1,
        num_particles: int = 100,
        alpha: float = 1.0,
        *,
        mode: Literal["sampling", "optimization"] = "sampling",
        init_std: float = 1.0,
        init_around_current: bool = False,
        effective_sample_size: float | None = None,
        num_runs: int = 1,
        seed: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if num_particles < 2:
            raise ValueError(f"num_particles must be >= 2, got {num_particles}")
        self._further = {"mode": mode}
        super().__init__(
            params,
            lr=lr,
            sigma=1.0,
            num_particles=num_particles,
            alpha=alpha,
            particle_batch_size=None,
            init_std=init_std,
            init_around_current=init_around_current,
            stall_tol=0.0,
            effective_sample_size=effective_sample_size,
            num_runs=num_runs,
            seed=seed,
            process_group=process_group,
        )

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        particles, shared = swarm["particles"], self.param_groups[0]
        losses = self._common_losses(evaluate(particles))
        weights, lowest = self._weigh(losses)
        self._settle(swarm, particles, losses, lowest, weighted_mean(particles, weights))
        center = swarm["consensus"][:, None]
        root = (particles - center).mul_(weights.nan_to_num(0.0).sqrt()[..., None])
        draws = self._noise((*losses.shape, losses.shape[1]), 0.0, 1.0)
        if self._ranks.own_coordinates:
            self._ranks.agree(draws)
        noise = torch.bmm(draws, root, out=torch.empty_like(root))
        heat = 1 + shared["alpha"] if shared["mode"] == "sampling" else 1.0
        for group, part, goal, push in self._layout.parts(particles, center, noise):
            keep = math.exp(-group["lr"])
            torch.lerp(goal, part, keep, out=part)
            part.add_(push, alpha=group["sigma"] * math.sqrt((1 - keep**2) * heat))

    def _warn_of_divergence(self, dim: int) -> None:
        pass  # the covariance contracts or is kept

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


class MemoryCBO(CBO):
    r"""Particles that remember the best place they have been at, and are drawn to it as well.

    S. Grassi and L. Pareschi, "From particle swarm optimization to consensus based optimization", 2021, and K. Riedl,
    "Leveraging memory effects and gradient information in consensus-based optimisation", arXiv 2211.12184. With
    :math:`y_i` the place of particle i with the lowest loss so far and m the weighted mean of these,

    .. math::
        v_i \leftarrow v_i - \lambda \Delta t\,(v_i - m) - \lambda_m \Delta t\,(v_i - y_i)
        + \sigma \sqrt{\Delta t}\,|v_i - m| \odot B_i + \sigma_m \sqrt{\Delta t}\,|v_i - y_i| \odot B'_i .

    Losses are compared over time: they should be of the same function. On changing data batches a lucky batch is
    remembered. The step's loss is the lowest remembered one. CBXpy draws to :math:`y_i` in a step of its own, after
    that to m. Memory: ``12 N d`` bytes with the noise. The gradient's drift of the paper is left out.

    Args:
        params: as in :class:`CBO`.
        lr: as in :class:`CBO`.
        lambda_: as in :class:`CBO`.
        sigma: as in :class:`CBO`.
        num_particles: as in :class:`CBO`.
        alpha: as in :class:`CBO`.
        lambda_memory: strength :math:`\lambda_m` of the drift to the remembered place, >= 0.
        sigma_memory: strength :math:`\sigma_m` of its noise, >= 0; None for ``lambda_memory * sigma``, as it then is.
        init_std: as in :class:`CBO`.
        init_around_current: as in :class:`CBO`.
        effective_sample_size: as in :class:`CBO`.
        num_runs: as in :class:`CBO`.
        seed: as in :class:`CBO`.
        shard: as in :class:`CBO`.
        process_group: as in :class:`CBO`.

    Raises:
        ValueError: an argument out of range.
    """

    _by_particle = ("particles", "memory")
    _losses_by_particle = ("memory_losses",)

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 0.1,
        lambda_: float = 1.0,
        sigma: float = 0.4**0.5,
        num_particles: int = 100,
        alpha: float = 50.0,
        lambda_memory: float = 0.4,
        sigma_memory: float | None = None,
        *,
        init_std: float = 1.0,
        init_around_current: bool = False,
        effective_sample_size: float | None = None,
        num_runs: int = 1,
        seed: int | None = None,
        shard: Literal["data", "particles"] = "data",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._further = {"lambda_memory": lambda_memory, "sigma_memory": sigma_memory}
        super().__init__(
            params,
            lr=lr,
            lambda_=lambda_,
            sigma=sigma,
            num_particles=num_particles,
            alpha=alpha,
            particle_batch_size=None,
            init_std=init_std,
            init_around_current=init_around_current,
            stall_tol=0.0,
            effective_sample_size=effective_sample_size,
            num_runs=num_runs,
            seed=seed,
            shard=shard,
            process_group=process_group,
        )

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        particles, memory = swarm["particles"], swarm["memory"]
        losses = self._common_losses(evaluate(particles))
        better = losses < swarm["memory_losses"]
        torch.where(better[..., None], particles, memory, out=memory)
        swarm["memory_losses"] = torch.minimum(losses, swarm["memory_losses"])
        center = self._find_consensus(swarm, memory, swarm["memory_losses"])[:, None]
        for group, part, best, goal in self._layout.parts(particles, memory, center):
            root = group["lr"] ** 0.5
            sigma = group["sigma_memory"]
            sigma = group["lambda_memory"] * group["sigma"] if sigma is None else sigma
            away = part - best
            noise = self._noise(part.shape, 1 - group["lambda_"] * group["lr"], group["sigma"] * root)
            torch.lerp(goal, part, noise, out=part)
            part.addcmul_(away, self._noise(part.shape, -group["lambda_memory"] * group["lr"], sigma * root))

    def _complete(self, swarm: dict[str, Any]) -> None:
        particles = swarm["particles"]
        if "memory" not in swarm or swarm["memory"].shape != particles.shape:  # losses of fewer coordinates mislead
            swarm["memory_losses"] = particles.new_full(particles.shape[:2], math.inf)
        self._extend(swarm, "memory", particles)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name in ("lambda_memory", "sigma_memory"):
            if group[name] is not None and not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {group[name]}")


class PolarizedCBO(CBO):
    r"""Every particle has a consensus point of its own, so that several minima can be found at once.

    L. Bungert, T. Roith and P. Wacker, "Polarized consensus-based dynamics for optimization and sampling", arXiv
    2211.05238. Particle i drifts to, and gets noise in proportion to its distance from,

    .. math::
        m_i = \frac{\sum_j w_{ij} v_j}{\sum_j w_{ij}}, \qquad
        w_{ij} = e^{-|v_i - v_j|^2 / (2 \kappa^2)}\, e^{-\alpha E(v_j)} ,

    the mean of the good particles near it; :math:`\kappa \to \infty` is :class:`CBO`. The particles end at the minima.
    The parameters become the consensus point of the particle with the lowest loss. CBXpy also has other kernels, and
    by default takes the exponent of the kernel times α: there :math:`\kappa / \sqrt{\alpha}` is our κ.

    Time: :math:`4 N^2 d` flops beyond :class:`CBO`. The distances are exact up to rounding in proportion to the
    squared spread of all particles.

    Args:
        params: as in :class:`CBO`.
        lr: as in :class:`CBO`.
        lambda_: as in :class:`CBO`.
        sigma: as in :class:`CBO`.
        num_particles: as in :class:`CBO`.
        alpha: as in :class:`CBO`.
        kappa: how far a particle sees, > 0, in units of the Euclidean distance of all parameters.
        noise: as in :class:`CBO`.
        init_std: as in :class:`CBO`.
        init_around_current: as in :class:`CBO`.
        num_runs: as in :class:`CBO`.
        seed: as in :class:`CBO`.
        process_group: as in :class:`CBO`. Ranks share the data; particles cannot be shared out.

    Raises:
        ValueError: an argument out of range.
    """

    _shared = (*CBO._shared, "kappa")

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 0.1,
        lambda_: float = 1.0,
        sigma: float = 0.4**0.5,
        num_particles: int = 100,
        alpha: float = 50.0,
        kappa: float = 1.0,
        *,
        noise: Literal["anisotropic", "isotropic"] = "anisotropic",
        init_std: float = 1.0,
        init_around_current: bool = False,
        num_runs: int = 1,
        seed: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._further = {"kappa": kappa}
        super().__init__(
            params,
            lr=lr,
            lambda_=lambda_,
            sigma=sigma,
            num_particles=num_particles,
            alpha=alpha,
            noise=noise,
            particle_batch_size=None,
            init_std=init_std,
            init_around_current=init_around_current,
            stall_tol=0.0,
            num_runs=num_runs,
            seed=seed,
            process_group=process_group,
        )

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
        self._move(particles, torch.where(known, centers, swarm["consensus"][:, None]), evaluate)

    def _squared_distances(self, particles: Tensor) -> Tensor:
        """``(runs, n, n)``, over all coordinates."""
        runs, number, _ = particles.shape
        x = particles - particles.mean(1, keepdim=True)
        products = torch.bmm(x, x.mT, out=x.new_empty(runs, number, number))
        if self._ranks.own_coordinates:
            dist.all_reduce(products, group=self._ranks.group)
        squares = products.diagonal(dim1=1, dim2=2)
        return (squares[:, None] + squares[:, :, None] - 2 * products).clamp_(min=0)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not group["kappa"] > 0:
            raise ValueError(f"kappa must be > 0, got {group['kappa']}")


class AdamCBO(CBO):
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
        params: as in :class:`CBO`.
        lr: time step Δt, >= 0.
        lambda_: as in :class:`CBO`.
        sigma: as in :class:`CBO`.
        num_particles: as in :class:`CBO`.
        alpha: as in :class:`CBO`.
        betas: how much of the two moments is kept at a step, each in [0, 1).
        eps: ε, > 0.
        init_std: as in :class:`CBO`.
        init_around_current: as in :class:`CBO`.
        effective_sample_size: as in :class:`CBO`.
        num_runs: as in :class:`CBO`.
        seed: as in :class:`CBO`.
        shard: as in :class:`CBO`.
        process_group: as in :class:`CBO`.

    Raises:
        ValueError: an argument out of range.
    """

    _by_particle = ("particles", "first", "second")

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 0.1,
        lambda_: float = 1.0,
        sigma: float = 0.4**0.5,
        num_particles: int = 100,
        alpha: float = 50.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        *,
        init_std: float = 1.0,
        init_around_current: bool = False,
        effective_sample_size: float | None = None,
        num_runs: int = 1,
        seed: int | None = None,
        shard: Literal["data", "particles"] = "data",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._further = {"betas": tuple(betas), "eps": eps}
        super().__init__(
            params,
            lr=lr,
            lambda_=lambda_,
            sigma=sigma,
            num_particles=num_particles,
            alpha=alpha,
            particle_batch_size=None,
            init_std=init_std,
            init_around_current=init_around_current,
            stall_tol=0.0,
            effective_sample_size=effective_sample_size,
            num_runs=num_runs,
            seed=seed,
            shard=shard,
            process_group=process_group,
        )

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        particles = swarm["particles"]
        steps = swarm["steps"] = swarm.get("steps", 0) + 1
        center = self._find_consensus(swarm, particles, self._common_losses(evaluate(particles)))[:, None]
        for group, part, first, second, goal in self._layout.parts(*(swarm[k] for k in self._by_particle), center):
            (beta1, beta2), lr = group["betas"], group["lr"]
            away = part - goal
            first.lerp_(away, 1 - beta1)
            second.mul_(beta2).addcmul_(away, away, value=1 - beta2)
            scale = (second / (1 - beta2**steps)).sqrt_().add_(group["eps"])
            part.addcdiv_(first, scale, value=-group["lambda_"] * lr / (1 - beta1**steps))
            part.addcmul_(away, self._noise(part.shape, 0.0, group["sigma"] * lr**0.5))

    def _complete(self, swarm: dict[str, Any]) -> None:
        for key in ("first", "second"):
            self._extend(swarm, key, torch.zeros_like(swarm["particles"]))

    def _warn_of_divergence(self, dim: int) -> None:
        pass  # the drift does not fall with the distance, so that CBO's condition says nothing

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not (len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"])):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
        if not group["eps"] > 0:
            raise ValueError(f"eps must be > 0, got {group['eps']}")
