"""Paths from data to noise: ``x_t = alpha(t) x_0 + sigma(t) eps``, data at the smallest ``t``, noise at the largest.

Every view of diffusion uses the same four numbers: ``alpha``, ``sigma`` and their derivatives in ``t``. They are in
closed form here, written so that nothing cancels near the data, and computed in at least float32.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lit_methods.diffusion.naming import named

Generators = torch.Generator | Sequence[torch.Generator] | None


class Point(NamedTuple):
    """Where a path is at one time; the fields are numbers, or tensors that broadcast against the samples.

    Attributes:
        alpha: factor of the data, >= 0.
        sigma: factor of the noise, >= 0.
        d_alpha: derivative of ``alpha`` in time, <= 0.
        d_sigma: derivative of ``sigma`` in time, >= 0.
    """

    alpha: Any
    sigma: Any
    d_alpha: Any
    d_sigma: Any


class Process(ABC):
    """A path ``x_t = alpha(t) x_0 + sigma(t) eps``; subclasses say :meth:`at` and :meth:`t_from_lam`.

    The forward SDE is ``dx = f x dt + g dW``, and ``lam = log(alpha / sigma)`` falls from data to noise.

    Attributes:
        t_min: smallest time to train at.
        t_max: time of pure noise, where sampling starts.
        t_clean: time at which ``alpha`` is 1 and ``sigma`` is 0; sampling ends there.
        prior_std: standard deviation of the noise at ``t_max``.
        grid: name of the time grid that suits it.
    """

    t_min: float
    t_max: float
    t_clean: ClassVar[float] = 0.0
    grid: ClassVar[str] = "uniform"

    @abstractmethod
    def at(self, t: Tensor | float) -> Point:
        """``alpha``, ``sigma`` and their derivatives, shaped like ``t``."""

    @abstractmethod
    def t_from_lam(self, lam: Tensor) -> Tensor:
        """The time at which ``log(alpha / sigma)`` is ``lam``; may lie beyond ``t_max``."""

    @property
    def prior_std(self) -> float:
        """Standard deviation of the noise at ``t_max``."""
        return float(self.at(self.t_max).sigma)

    def alpha(self, t: Tensor | float) -> Tensor:
        """Factor of the data."""
        return self.at(t).alpha

    def sigma(self, t: Tensor | float) -> Tensor:
        """Factor of the noise."""
        return self.at(t).sigma

    def d_alpha(self, t: Tensor | float) -> Tensor:
        """Derivative of ``alpha``."""
        return self.at(t).d_alpha

    def d_sigma(self, t: Tensor | float) -> Tensor:
        """Derivative of ``sigma``."""
        return self.at(t).d_sigma

    def lam(self, t: Tensor | float) -> Tensor:
        """``log(alpha / sigma)``, half the logarithm of the signal-to-noise ratio."""
        point = self.at(t)
        return point.alpha.log() - point.sigma.log()

    def f(self, t: Tensor | float) -> Tensor:
        """Drift factor of the forward SDE, ``alpha' / alpha``."""
        point = self.at(t)
        return point.d_alpha / point.alpha

    def g2(self, t: Tensor | float) -> Tensor:
        """Squared diffusion coefficient of the forward SDE, ``2 sigma sigma' - 2 f sigma^2``."""
        point = self.at(t)
        return 2 * point.sigma * (point.d_sigma - point.sigma * point.d_alpha / point.alpha)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``alpha x0 + sigma eps`` at a time for each sample.

        Args:
            x0: data ``(batch, ...)``.
            eps: noise, of the same shape.
            t: ``(batch,)`` or a single time.

        Raises:
            ValueError: ``t`` is of another shape, or (looked at on the CPU only) outside of the process.
        """
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_times(t)
        point = self.at(t)
        return per_sample(point.alpha, x0) * x0 + per_sample(point.sigma, x0) * eps

    def check_times(self, t: Tensor) -> None:
        """Refuse times before the clean one or after ``t_max``."""
        slack = 1e-6 * self.t_max
        if len(t.flatten()) and not bool(((t >= self.t_clean - slack) & (t <= self.t_max + slack)).all()):
            low, high = float(t.min()), float(t.max())
            raise ValueError(
                f"t must be in [{self.t_clean:g}, {self.t_max:g}] for {self}, got values from {low:g} to {high:g}"
            )

    def prior_sample(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Noise to start from; ``generator`` may be a list with one for each row."""
        return self.prior_std * draw_noise(shape, generator, device, dtype)


class _VariancePreserving(Process):
    """``sigma = sqrt(1 - alpha^2)``."""

    def t_from_lam(self, lam: Tensor) -> Tensor:
        return self._t_from_log_alpha(-0.5 * torch.nn.functional.softplus(-2 * lam))

    @abstractmethod
    def _t_from_log_alpha(self, log_alpha: Tensor) -> Tensor: ...


def _check_betas(beta_0: float, beta_1: float) -> None:
    if not 0 < beta_0 < beta_1 < math.inf:
        raise ValueError(f"beta_0 and beta_1 must be 0 < beta_0 < beta_1, got {beta_0} and {beta_1}")


def _linear_log_alpha(process: "VPLinear | SubVP", t: Tensor) -> tuple[Tensor, Tensor]:
    """``log alpha`` of linearly growing betas, and its derivative."""
    slope = process.beta_1 - process.beta_0
    return -t * (0.25 * t * slope + 0.5 * process.beta_0), -0.5 * (t * slope + process.beta_0)


def _linear_t(process: "VPLinear | SubVP", log_alpha: Tensor) -> Tensor:
    total = -2 * log_alpha  # the integral of beta
    root = (process.beta_0**2 + 2 * (process.beta_1 - process.beta_0) * total).sqrt()
    return 2 * total / (process.beta_0 + root)


@dataclass(frozen=True)
class VPLinear(_VariancePreserving):
    """Variance-preserving diffusion with betas that grow linearly: DDPM in continuous time (Song et al. 2021).

    Args:
        beta_0: beta at ``t = 0``, > 0.
        beta_1: beta at ``t = 1``, > ``beta_0``.
        t_min: smallest time to train at, in (0, 1).

    Raises:
        ValueError: an argument out of range.
    """

    beta_0: float = 0.1
    beta_1: float = 20.0
    t_min: float = 1e-3

    t_max: ClassVar[float] = 1.0  # type: ignore[misc]

    def __post_init__(self) -> None:
        _check_betas(self.beta_0, self.beta_1)
        _check_t_min(self.t_min, self.t_max)

    def at(self, t: Tensor | float) -> Point:
        """``alpha = exp(-t^2 (beta_1 - beta_0) / 4 - t beta_0 / 2)``."""
        log_alpha, slope = _linear_log_alpha(self, _precise(t))
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        return Point(alpha, sigma, alpha * slope, -(alpha**2) * slope / sigma)

    def _t_from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        return _linear_t(self, log_alpha)


@dataclass(frozen=True)
class VPCosine(_VariancePreserving):
    """Variance-preserving diffusion whose ``alpha`` falls like a cosine (Nichol and Dhariwal 2021).

    Args:
        offset: the small ``s`` that keeps the first noise from vanishing, >= 0.
        t_min: smallest time to train at, in (0, 1).
        t_max: largest time, in (0, 1]; at 1 nothing of the data is left, which needs a prediction other than noise.

    Raises:
        ValueError: an argument out of range.
    """

    offset: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.offset < 1:
            raise ValueError(f"offset must be in [0, 1), got {self.offset}")
        if not 0 < self.t_max <= 1:
            raise ValueError(f"t_max must be in (0, 1], got {self.t_max}")
        _check_t_min(self.t_min, self.t_max)

    @property
    def _start(self) -> float:
        return 0.5 * math.pi * self.offset / (1 + self.offset)

    def at(self, t: Tensor | float) -> Point:
        """``alpha = cos((t + s) pi / (2 + 2 s)) / cos(s pi / (2 + 2 s))``."""
        t = _precise(t)
        speed, start = 0.5 * math.pi / (1 + self.offset), self._start
        angle = speed * t
        # cos^2(a) - cos^2(b) = sin(b - a) sin(b + a), which does not cancel near the data.
        sigma = (angle.sin() * (angle + 2 * start).sin()).clamp(min=0).sqrt() / math.cos(start)
        alpha = (angle + start).cos().clamp(min=0) / math.cos(start)
        alpha = torch.where(t >= 1, torch.zeros_like(alpha), alpha)
        d_alpha = -speed * (angle + start).sin() / math.cos(start)
        return Point(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def _t_from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        alpha, sigma2 = log_alpha.exp(), -torch.expm1(2 * log_alpha)
        cos, sin = math.cos(self._start), math.sin(self._start)
        angle = torch.atan2((sin**2 + sigma2 * cos**2).sqrt(), alpha * cos)
        return (angle - self._start) * (1 + self.offset) / (0.5 * math.pi)


@dataclass(frozen=True)
class SubVP(Process):
    """Like :class:`VPLinear` with less noise, ``sigma = 1 - alpha^2`` (Song et al. 2021).

    Args:
        beta_0: beta at ``t = 0``, > 0.
        beta_1: beta at ``t = 1``, > ``beta_0``.
        t_min: smallest time to train at, in (0, 1).

    Raises:
        ValueError: an argument out of range.
    """

    beta_0: float = 0.1
    beta_1: float = 20.0
    t_min: float = 1e-3

    t_max: ClassVar[float] = 1.0  # type: ignore[misc]

    def __post_init__(self) -> None:
        _check_betas(self.beta_0, self.beta_1)
        _check_t_min(self.t_min, self.t_max)

    def at(self, t: Tensor | float) -> Point:
        """``alpha`` as in :class:`VPLinear`, ``sigma = 1 - alpha^2``."""
        log_alpha, slope = _linear_log_alpha(self, _precise(t))
        alpha = log_alpha.exp()
        return Point(alpha, -torch.expm1(2 * log_alpha), alpha * slope, -2 * alpha**2 * slope)

    def t_from_lam(self, lam: Tensor) -> Tensor:
        """Solves ``alpha / (1 - alpha^2) = exp(lam)``."""
        ratio = lam.exp()
        sigma = 2 / (1 + (1 + 4 * ratio**2).sqrt())
        log_alpha = torch.where(ratio > 1, 0.5 * torch.log1p(-sigma.clamp(max=0.9)), lam + sigma.log())
        return _linear_t(self, log_alpha)


@dataclass(frozen=True)
class VE(Process):
    """Variance-exploding diffusion: ``alpha = 1``, ``sigma = sigma_min (sigma_max / sigma_min)^t`` (Song et al. 2021).

    Args:
        sigma_min: noise at ``t = 0``, > 0.
        sigma_max: noise at ``t = 1``, > ``sigma_min``.

    Raises:
        ValueError: an argument out of range.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    t_min: ClassVar[float] = 0.0  # type: ignore[misc]
    t_max: ClassVar[float] = 1.0  # type: ignore[misc]
    t_clean: ClassVar[float] = -math.inf
    grid: ClassVar[str] = "karras"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    def at(self, t: Tensor | float) -> Point:
        """``alpha = 1``, ``sigma = sigma_min (sigma_max / sigma_min)^t``."""
        t = _precise(t)
        rate = math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_min * (rate * t).exp()
        return Point(torch.ones_like(t), sigma, torch.zeros_like(t), rate * sigma)

    def t_from_lam(self, lam: Tensor) -> Tensor:
        """``log(sigma / sigma_min) / log(sigma_max / sigma_min)``."""
        return (-lam - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(Process):
    """``alpha = 1``, ``sigma = t`` (Karras et al. 2022, arXiv 2206.00364).

    Args:
        sigma_min: smallest noise, > 0.
        sigma_max: noise that sampling starts from, > ``sigma_min``.

    Raises:
        ValueError: an argument out of range.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    grid: ClassVar[str] = "karras"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """``sigma_min``."""
        return self.sigma_min

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """``sigma_max``."""
        return self.sigma_max

    def at(self, t: Tensor | float) -> Point:
        """``alpha = 1``, ``sigma = t``."""
        t = _precise(t)
        one = torch.ones_like(t)
        return Point(one, t, torch.zeros_like(t), one)

    def t_from_lam(self, lam: Tensor) -> Tensor:
        """``exp(-lam)``."""
        return (-lam).exp()


@dataclass(frozen=True)
class FlowMatching(Process):
    """Straight lines, ``x_t = (1 - t) x_0 + t eps``: flow matching, rectified flow (arXiv 2210.02747, 2209.03003)."""

    t_min: ClassVar[float] = 0.0  # type: ignore[misc]
    t_max: ClassVar[float] = 1.0  # type: ignore[misc]

    def at(self, t: Tensor | float) -> Point:
        """``alpha = 1 - t``, ``sigma = t``."""
        t = _precise(t)
        one = torch.ones_like(t)
        return Point(1 - t, t, -one, one)

    def t_from_lam(self, lam: Tensor) -> Tensor:
        """``1 / (1 + exp(lam))``."""
        return torch.sigmoid(-lam)


@dataclass(frozen=True)
class TrigFlow(Process):
    """Arcs, ``x_t = cos(t) x_0 + sin(t) sigma_data eps`` with ``t`` in [0, pi / 2] (arXiv 2410.11081).

    Args:
        sigma_data: standard deviation of the noise, > 0; that of the data keeps the variance constant.

    Raises:
        ValueError: an argument out of range.
    """

    sigma_data: float = 1.0

    t_min: ClassVar[float] = 0.0  # type: ignore[misc]
    t_max: ClassVar[float] = math.pi / 2  # type: ignore[misc]

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be > 0, got {self.sigma_data}")

    def at(self, t: Tensor | float) -> Point:
        """``alpha = cos t``, ``sigma = sigma_data sin t``."""
        t = _precise(t)
        # The floating-point number nearest to pi / 2 is not pi / 2.
        cos = torch.where(t >= torch.tensor(self.t_max, dtype=t.dtype, device=t.device), torch.zeros_like(t), t.cos())
        sin = t.sin()
        return Point(cos, self.sigma_data * sin, -sin, self.sigma_data * cos)

    def t_from_lam(self, lam: Tensor) -> Tensor:
        """``atan(exp(-lam) / sigma_data)``."""
        return torch.atan((-lam).exp() / self.sigma_data)


PROCESSES: dict[str, type[Process]] = {
    "vp_linear": VPLinear,
    "vp_cosine": VPCosine,
    "sub_vp": SubVP,
    "ve": VE,
    "edm": EDM,
    "fm": FlowMatching,
    "trigflow": TrigFlow,
}


def as_process(process: str | Process) -> Process:
    """The process that a name stands for: ``vp_linear vp_cosine sub_vp ve edm fm trigflow``."""
    return named("process", process, PROCESSES, Process)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value per sample, or a single one, so that it multiplies ``x`` of shape ``(batch, ...)``.

    Raises:
        ValueError: for any other shape: a time per sample must never spread along another axis.
    """
    if values.ndim == 0:
        return values
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"t must have shape () or ({x.shape[0] if x.ndim else 1},), one time per sample, got {tuple(values.shape)}"
        )
    return values.view(-1, *[1] * (x.ndim - 1))


def draw_noise(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal numbers; from a list of generators, each row from its own.

    Raises:
        ValueError: the list has another length than there are rows.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
    if len(generator) != shape[0]:
        raise ValueError(f"generator must hold one generator for each of {shape[0]} samples, got {len(generator)}")
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.stack(rows).to(device=device)


def _check_t_min(t_min: float, t_max: float) -> None:
    if not 0 < t_min < t_max:
        raise ValueError(f"t_min must be in (0, {t_max:g}), got {t_min}")


def _precise(t: Tensor | float) -> Tensor:
    """Times as a tensor of at least 32 bits; in bfloat16, 0.999 is 1."""
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float64)
    return t if t.dtype in (torch.float32, torch.float64) else t.float()
