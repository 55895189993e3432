"""How a network learns to jump along the probability-flow ODE: MeanFlow, consistency, sCM, CTM.

Each objective is an object with its settings. It says what the network of a :class:`~lit_methods.diffusion.FlowMap`
means (process, prediction and preconditioning of its denoiser), what is the loss, and how to jump.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.derivatives import Method, along
from lit_methods.diffusion.diffusion import denoising_loss
from lit_methods.diffusion.naming import check_finite_fields, named
from lit_methods.diffusion.predictions import combine, point_at
from lit_methods.diffusion.processes import EDM, FlowMatching, Process, TrigFlow, draw_noise, per_sample
from lit_methods.diffusion.solvers import Noise
from lit_methods.diffusion.time_samplers import LogitNormal, LognormalSigma, TimeSampler


@dataclass
class Learner:
    """What a loss may use besides the data.

    Attributes:
        denoiser: the student.
        teacher: a trained denoiser of the same process, or ``None``.
        jvp: how derivatives of the network are taken.
        progress: training steps so far.
        stage: of a consistency schedule, >= 0.
        log_variance: learned log-variance of the loss as a function of ``t``, for objectives that have one.
    """

    denoiser: Denoiser
    teacher: Denoiser | None
    jvp: Method
    progress: int
    stage: int
    log_variance: nn.Module | None


class Objective(ABC):
    """A loss for networks that jump.

    Attributes:
        prediction: what the network predicts.
        precondition: what it sees.
        two_times: whether it is told where to jump, ``net(x, t, cond, s=s)``; otherwise it jumps to the data only.
        learns_variance: whether the loss has a learned log-variance.
        takes_teacher: whether a teacher may be given.
    """

    def __post_init__(self) -> None:
        check_finite_fields(self)

    prediction: ClassVar[str]
    precondition: ClassVar[str]
    two_times: ClassVar[bool] = False
    learns_variance: ClassVar[bool] = False
    takes_teacher: ClassVar[bool] = True

    @abstractmethod
    def process(self, sigma_data: float) -> Process:
        """The path."""

    @abstractmethod
    def losses(self, learner: Learner, x0: Tensor, cond: Any, generator: torch.Generator | None) -> Tensor:
        """The loss of each sample, ``(batch,)``."""

    @abstractmethod
    def jump(self, denoiser: Denoiser, x: Tensor, t: float, s: float, cond: Any, noise: Noise) -> Tensor:
        """Samples at time ``s < t`` from those at ``t``."""


@dataclass(frozen=True)
class MeanFlow(Objective):
    """The network predicts the mean velocity from ``t`` to ``s`` (arXiv 2505.13447): ``u = v - (t - s) du/dt``.

    The loss of a sample is ``|u - target|^2 / (|u - target|^2 + c)^p`` with the squares summed over its values.

    Args:
        t: distribution of the two times; the later one is ``t``.
        s: distribution of the other; ``None``: the same.
        different: share of the batch whose times differ, in [0, 1]; the rest learn plain flow matching.
        power: ``p``, >= 0: 0 is the plain square, 1 nearly its root.
        offset: ``c``, > 0.
        guidance: ``(omega, kappa)``, guidance that becomes part of what is learned: the velocity is ``omega v + (1 -
            omega - kappa) u(null) + kappa u(told)``; ``None``: none.
        guidance_until: largest time at which to guide.

    Raises:
        ValueError: an argument out of range.
    """

    t: TimeSampler = field(default_factory=lambda: LogitNormal(-0.4, 1.0))
    s: TimeSampler | None = None
    different: float = 0.5
    power: float = 1.0
    offset: float = 1e-3
    guidance: tuple[float, float] | None = None
    guidance_until: float = 1.0

    prediction: ClassVar[str] = "flow"
    precondition: ClassVar[str] = "none"
    two_times: ClassVar[bool] = True
    takes_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not 0 <= self.different <= 1:
            raise ValueError(f"different must be in [0, 1], got {self.different}")
        if not self.power >= 0:
            raise ValueError(f"power must be >= 0, got {self.power}")
        if not self.offset > 0:
            raise ValueError(f"offset must be > 0, got {self.offset}")

    def process(self, sigma_data: float) -> Process:
        """Straight lines."""
        return FlowMatching()

    def losses(self, learner: Learner, x0: Tensor, cond: Any, generator: torch.Generator | None) -> Tensor:
        """The error of the MeanFlow identity."""
        denoiser, path = learner.denoiser, learner.denoiser.process
        dtype = _time_dtype(x0)
        t = self.t.sample(len(x0), path, generator, x0.device, dtype, stratified=True)
        s = (self.s or self.t).sample(len(x0), path, generator, x0.device, dtype)
        t, s = torch.maximum(t, s), torch.minimum(t, s)
        same = torch.rand(len(x0), generator=generator, device=x0.device) >= self.different
        s = torch.where(same, t, s)
        eps = draw_noise(x0.shape, generator, x0.device, x0.dtype)
        x = path.add_noise(x0, eps, t)
        velocity = combine(x0, eps, "flow", point_at(path, t, x0))
        if self.guidance is not None:
            velocity = self._guided(denoiser, x, t, cond, velocity)
        one = torch.ones_like(t)
        mean, slope = along(
            lambda x, t, s: denoiser(x, t, cond, s), (x, t, s), (velocity, one, torch.zeros_like(s)), learner.jvp
        )
        target = velocity - per_sample(t - s, x) * slope
        squares = (mean - target.detach()).square().flatten(1).sum(1)
        return squares / (squares.detach() + self.offset) ** self.power

    def jump(self, denoiser: Denoiser, x: Tensor, t: float, s: float, cond: Any, noise: Noise) -> Tensor:
        """``x - (t - s) u``."""
        later = torch.full(x.shape[:1], s, device=x.device, dtype=_time_dtype(x))
        return x - (t - s) * denoiser(x, torch.full_like(later, t), cond, later)

    def _guided(self, denoiser: Denoiser, x: Tensor, t: Tensor, cond: Any, velocity: Tensor) -> Tensor:
        if cond is None or denoiser.conditioning is None or self.guidance is None:
            raise ValueError(f"guidance={self.guidance} needs a conditioning, got none")
        omega, kappa = self.guidance
        with torch.no_grad():
            told = denoiser(x, t, cond, t)
            null = denoiser(x, t, denoiser.conditioning.null(cond), t)
        guided = omega * velocity + (1 - omega - kappa) * null + kappa * told
        return torch.where(per_sample(t, x) <= self.guidance_until, guided, velocity)


@dataclass(frozen=True)
class Consistency(Objective):
    """The network jumps to the data, from two neighbouring times to the same place (arXiv 2303.01469, 2406.14548).

    Without a teacher (consistency training) both points share data and noise; with one (distillation) the nearer point
    is one step of the teacher away. Neighbours come closer with the stage, see
    :class:`~lit_methods.callbacks.ConsistencySchedule`: ``r = t - t q^-(stage + 1) (1 + 8 sigmoid(-t))``.

    Args:
        t: distribution of ``t``.
        base: ``q``, > 1.
        closest: smallest ``q^-(stage + 1)``, in (0, 1).
        offset: ``c`` of the loss ``sqrt(|difference|^2 + c^2) - c``, > 0.
        guidance: scale of the teacher's classifier-free guidance; 1: none.

    Raises:
        ValueError: an argument out of range.
    """

    t: TimeSampler = field(default_factory=lambda: LognormalSigma(-1.1, 2.0))
    base: float = 2.0
    closest: float = 1e-3
    offset: float = 1e-8
    guidance: float = 1.0

    prediction: ClassVar[str] = "edm"
    precondition: ClassVar[str] = "edm"

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not self.base > 1:
            raise ValueError(f"base must be > 1, got {self.base}")
        if not 0 < self.closest < 1:
            raise ValueError(f"closest must be in (0, 1), got {self.closest}")
        if not self.offset > 0:
            raise ValueError(f"offset must be > 0, got {self.offset}")

    def process(self, sigma_data: float) -> Process:
        """``alpha = 1``, ``sigma = t``."""
        return EDM()

    def nearer(self, t: Tensor, stage: int) -> Tensor:
        """The neighbour ``r`` of ``t``, >= 0."""
        gap = max(self.base ** -(stage + 1), self.closest)
        return (t - t * gap * (1 + 8 * torch.sigmoid(-t))).clamp(min=0)

    def losses(self, learner: Learner, x0: Tensor, cond: Any, generator: torch.Generator | None) -> Tensor:
        """Distance of the two jumps over the distance of the times."""
        denoiser, path = learner.denoiser, learner.denoiser.process
        t = self.t.sample(len(x0), path, generator, x0.device, _time_dtype(x0), stratified=True)
        r = self.nearer(t, learner.stage)
        eps = draw_noise(x0.shape, generator, x0.device, x0.dtype)
        x = path.add_noise(x0, eps, t)
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad():  # the same dropout in both calls
            if learner.teacher is None:
                near = path.add_noise(x0, eps, r)
            else:
                near = x + per_sample(r - t, x) * _guided_flow(learner.teacher, x, t, cond, self.guidance)
            # Jumping from the data to the data is no jump.
            target = torch.where(per_sample(r, x) > 0, denoiser.x0(near, r.clamp(min=1e-6), cond), x0)
        squares = (denoiser.x0(x, t, cond) - target).square().flatten(1).sum(1)
        return ((squares + self.offset**2).sqrt() - self.offset) / (t - r)

    def jump(self, denoiser: Denoiser, x: Tensor, t: float, s: float, cond: Any, noise: Noise) -> Tensor:
        """Jump to the data, and add the noise of ``s``."""
        return _renoised(denoiser, denoiser.x0(x, t, cond), s, noise)


@dataclass(frozen=True)
class SCM(Objective):
    """Consistency in continuous time on arcs (sCM, arXiv 2410.11081): the tangent of the jump is driven to zero.

    Without a teacher the velocity is that of the pair of data and noise, with one it is the teacher's.

    Args:
        t: distribution of ``t``.
        warmup: steps over which the unstable part of the tangent comes in, >= 0.
        offset: ``c`` of the normalised tangent ``g / (|g| + c)``, > 0.

    Raises:
        ValueError: an argument out of range.
    """

    t: TimeSampler = field(default_factory=lambda: LognormalSigma(-1.0, 1.4))
    warmup: int = 10_000
    offset: float = 0.1

    prediction: ClassVar[str] = "edm"
    precondition: ClassVar[str] = "scale"
    learns_variance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if self.warmup < 0:
            raise ValueError(f"warmup must be >= 0, got {self.warmup}")
        if not self.offset > 0:
            raise ValueError(f"offset must be > 0, got {self.offset}")

    def process(self, sigma_data: float) -> Process:
        """Arcs whose noise is as large as the data."""
        return TrigFlow(sigma_data)

    def losses(self, learner: Learner, x0: Tensor, cond: Any, generator: torch.Generator | None) -> Tensor:
        """Squared error of the network against itself moved by the tangent, with a learned variance."""
        path = learner.denoiser.process
        t = self.t.sample(len(x0), path, generator, x0.device, _time_dtype(x0), stratified=True)
        eps = draw_noise(x0.shape, generator, x0.device, x0.dtype)
        x = path.add_noise(x0, eps, t)
        if learner.teacher is None:
            velocity = combine(x0, eps, "flow", point_at(path, t, x0))
        else:
            with torch.no_grad():
                velocity = learner.teacher.flow(x, t, cond)
        warm = 1.0 if self.warmup == 0 else min(learner.progress / self.warmup, 1.0)
        out, tangent = self.tangent(learner, x, t, velocity, cond, warm)
        norm = tangent.flatten(1).norm(dim=1)
        moved = out.detach() + tangent / per_sample(norm + self.offset, x)
        assert learner.log_variance is not None
        log_variance = learner.log_variance(t)
        weight = 1 / (learner.denoiser.sigma_data * t.tan())
        return weight * (-log_variance).exp() * (out - moved).square().flatten(1).mean(1) + log_variance

    def tangent(
        self, learner: Learner, x: Tensor, t: Tensor, velocity: Tensor, cond: Any, warm: float
    ) -> tuple[Tensor, Tensor]:
        """``F``, whose flow is ``sigma_data F``, and the tangent ``g`` that it should follow; 0 at the exact jump."""
        sd = learner.denoiser.sigma_data
        cos, sin = per_sample(t.cos(), x), per_sample(t.sin(), x)
        both = cos * sin
        # Tangents times cos t sin t, which keeps the derivative of the network finite at both ends.
        out, slope = along(
            lambda x, t: -learner.denoiser(x, t, cond), (x, t), (both * velocity, t.cos() * t.sin()), learner.jvp
        )
        tangent = -(cos**2) * (sd * out.detach() - velocity) - warm * (both * x + sd * slope)
        return out, tangent

    def jump(self, denoiser: Denoiser, x: Tensor, t: float, s: float, cond: Any, noise: Noise) -> Tensor:
        """Jump to the data, and add the noise of ``s``."""
        return _renoised(denoiser, denoiser.x0(x, t, cond), s, noise)


@dataclass(frozen=True)
class CTM(Objective):
    """Jumps from any time to any earlier one (arXiv 2310.02279): ``G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)``.

    A jump from ``t`` to ``s`` should end where a step of the teacher to a near ``u`` in ``[s, t)`` and a jump from
    there end, compared after jumping on to the data; besides, ``g(x, t, t)`` is a denoiser. Without a teacher that
    denoiser is the teacher: in 2000 steps on Gaussian data this found the mean but not yet the spread of the data, so
    choose another objective where there is no teacher.

    Args:
        t: distribution of ``t``; it must reach the noise that samples start from, unlike that of a denoiser.
        ratio: largest ``t / u`` of the teacher's step, > 1; one long step would end near the mean of the data.
        denoising: weight of the denoising loss, > 0.
        guidance: scale of the teacher's classifier-free guidance; 1: none.

    Raises:
        ValueError: an argument out of range.
    """

    t: TimeSampler = field(default_factory=lambda: LognormalSigma(0.0, 2.0))
    ratio: float = 1.3
    denoising: float = 1.0
    guidance: float = 1.0

    prediction: ClassVar[str] = "edm"
    precondition: ClassVar[str] = "edm"
    two_times: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not self.ratio > 1:
            raise ValueError(f"ratio must be > 1, got {self.ratio}")
        if not self.denoising > 0:
            raise ValueError(f"denoising must be > 0, got {self.denoising}")

    def process(self, sigma_data: float) -> Process:
        """``alpha = 1``, ``sigma = t``."""
        return EDM()

    def losses(self, learner: Learner, x0: Tensor, cond: Any, generator: torch.Generator | None) -> Tensor:
        """Soft consistency and denoising."""
        denoiser, path = learner.denoiser, learner.denoiser.process
        t = self.t.sample(len(x0), path, generator, x0.device, _time_dtype(x0), stratified=True)
        low = torch.rand(len(x0), generator=generator, device=x0.device, dtype=t.dtype)
        middle = torch.rand(len(x0), generator=generator, device=x0.device, dtype=t.dtype)
        s = path.t_min + (t - path.t_min) * low
        u = torch.maximum(s, t * self.ratio**-middle)
        eps = draw_noise(x0.shape, generator, x0.device, x0.dtype)
        x = path.add_noise(x0, eps, t)
        end = torch.full_like(t, path.t_min)
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad():
            if learner.teacher is None:
                flow = denoiser.predict(x, t, cond, "flow", t)
            else:
                flow = _guided_flow(learner.teacher, x, t, cond, self.guidance)
            there = self.map(denoiser, x + per_sample(u - t, x) * flow, u, s, cond)
            target = self.map(denoiser, there, s, end, cond)
        # The jump on to the data only measures: were it trained too, all jumps would agree by shrinking to the mean.
        arrived = self.map(_frozen(denoiser), self.map(denoiser, x, t, s, cond), s, end, cond)
        soft = (arrived - target).square().flatten(1).mean(1)
        plain = Denoiser(
            lambda x, t, cond=None: denoiser.predict(x, t, cond, "x0", t), path, "x0", sigma_data=denoiser.sigma_data
        )
        return soft + self.denoising * denoising_loss(plain, x0, eps, t, "edm", cond)

    def map(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
        """``G(x, t, s)``."""
        share = per_sample(s / t, x)
        return share * x + (1 - share) * denoiser.predict(x, t, cond, "x0", s)

    def jump(self, denoiser: Denoiser, x: Tensor, t: float, s: float, cond: Any, noise: Noise) -> Tensor:
        """``G(x, t, s)``."""
        times = torch.full(x.shape[:1], t, device=x.device, dtype=_time_dtype(x))
        end = torch.full_like(times, max(s, denoiser.process.t_min))
        if s > 0:
            return self.map(denoiser, x, times, end, cond)
        return denoiser.predict(x, times, cond, "x0", end)


OBJECTIVES: dict[str, type[Objective]] = {"meanflow": MeanFlow, "consistency": Consistency, "scm": SCM, "ctm": CTM}


def as_objective(objective: str | Objective) -> Objective:
    """The objective that a name stands for: ``meanflow consistency scm ctm``."""
    return named("objective", objective, OBJECTIVES, Objective)


class LogVariance(nn.Module):
    """A log-variance as a function of time, zero to begin with: a linear function of some of its waves."""

    frequencies: Tensor

    def __init__(self, waves: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, waves + 1) * math.pi / 4, persistent=False)
        self.linear = nn.Linear(2 * waves, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """``(batch,)`` of times ``(batch,)``."""
        angles = t[:, None] * self.frequencies.to(t.dtype)
        return self.linear(torch.cat([angles.sin(), angles.cos()], 1).to(self.linear.weight.dtype))[:, 0]


def _frozen(denoiser: Denoiser) -> Denoiser:
    """The denoiser with its present weights as constants; gradients pass through to its inputs."""
    if not isinstance(denoiser.net, nn.Module):
        return denoiser
    net, weights = denoiser.net, {name: p.detach() for name, p in denoiser.net.named_parameters()}
    return Denoiser(
        lambda *args, **kwargs: torch.func.functional_call(net, weights, args, kwargs),
        denoiser.process,
        denoiser.prediction,
        denoiser.precondition,
        denoiser.sigma_data,
        denoiser.conditioning,
    )


def _guided_flow(teacher: Denoiser, x: Tensor, t: Tensor, cond: Any, scale: float) -> Tensor:
    """The teacher's velocity with classifier-free guidance."""
    if scale == 1:
        return teacher.flow(x, t, cond)
    if cond is None or teacher.conditioning is None:
        raise ValueError(f"guidance={scale} needs a teacher with a conditioning, got none")
    both = torch.cat([teacher.conditioning.null(cond), cond])
    null, told = teacher.flow(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return torch.lerp(null, told, scale)


def _renoised(denoiser: Denoiser, x0: Tensor, s: float, noise: Noise) -> Tensor:
    if s == denoiser.process.t_clean:
        return x0
    point = point_at(denoiser.process, s, x0)
    return point.alpha * x0 + point.sigma * noise(x0)


def _time_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
