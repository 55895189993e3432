"""Distributions of training times, each as the map of a uniform number: so all can be stratified."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_methods.diffusion.grids import noise_range
from lit_methods.diffusion.naming import check_finite_fields, named
from lit_methods.diffusion.processes import Process


class TimeSampler(ABC):
    """Draws training times of a process."""

    def __post_init__(self) -> None:
        check_finite_fields(self)

    @abstractmethod
    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """The time below, or above, which a fraction ``u`` in (0, 1) of the distribution lies."""

    def sample(
        self,
        n: int,
        process: Process,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        stratified: bool = False,
    ) -> Tensor:
        """Draw ``n`` times; nothing is read back from the device.

        Args:
            n: number of times.
            process: whose times.
            generator: source of randomness, on ``device``.
            device: where the times are made.
            dtype: float32 or float64.
            stratified: one time in each n-th of the distribution, in random order, instead of independent ones: less
                variance of the loss for the same work.

        Returns:
            Times ``(n,)`` in ``[t_min, t_max]`` of the process.
        """
        u = torch.rand(n, generator=generator, device=device, dtype=dtype)
        if stratified:
            order = torch.randperm(n, generator=generator, device=device)
            u = (order + u) / n
        times = self.quantile(u.clamp(1e-6, 1 - 1e-6), process)
        return times.clamp(max(process.t_min, 1e-6 if process.t_clean == 0 else process.t_min), process.t_max)


@dataclass(frozen=True)
class UniformTimes(TimeSampler):
    """Uniform between ``low`` and ``high`` times ``t_max``, but not below ``t_min``.

    Args:
        low: smallest time over ``t_max``, in [0, 1).
        high: largest time over ``t_max``, in (``low``, 1].

    Raises:
        ValueError: an argument out of range.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low and high must be 0 <= low < high <= 1, got {self.low} and {self.high}")

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """``low + u (high - low)`` in units of ``t_max``."""
        low = max(process.t_min, self.low * process.t_max)
        return low + u * (self.high * process.t_max - low)


@dataclass(frozen=True)
class LognormalSigma(TimeSampler):
    """``log(sigma / alpha)`` is normal (Karras et al. 2022).

    Args:
        mean: its mean.
        std: its standard deviation, > 0.

    Raises:
        ValueError: an argument out of range.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        check_finite_fields(self)
        _check_std(self.std)

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """The time where ``log(sigma / alpha)`` is that normal quantile."""
        return process.t_from_lam(-(self.mean + self.std * torch.special.ndtri(u)))


@dataclass(frozen=True)
class LogitNormal(TimeSampler):
    """``log(u / (1 - u))`` is normal, where ``u`` is the time over ``t_max`` (Esser et al. 2024, arXiv 2403.03206).

    Args:
        mean: its mean; above 0 prefers noise.
        std: its standard deviation, > 0.

    Raises:
        ValueError: an argument out of range.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        _check_std(self.std)

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """``t_max sigmoid(mean + std z)``."""
        return process.t_max * torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class ShiftedTimes(TimeSampler):
    """Times of another sampler moved towards noise, ``u -> s u / (1 + (s - 1) u)`` with ``u = t / t_max``.

    Args:
        shift: ``s``, > 0; 3 is usual for large images, 1 changes nothing.
        times: the sampler whose times are moved.

    Raises:
        ValueError: an argument out of range.
    """

    shift: float = 3.0
    times: TimeSampler = field(default_factory=UniformTimes)

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not self.shift > 0:
            raise ValueError(f"shift must be > 0, got {self.shift}")

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """The shifted quantile."""
        share = self.times.quantile(u, process) / process.t_max
        return process.t_max * self.shift * share / (1 + (self.shift - 1) * share)


@dataclass(frozen=True)
class UniformLambda(TimeSampler):
    """``log(alpha / sigma)`` is uniform between its values at ``t_min`` and ``t_max``.

    Args:
        sigma_min: smallest ``sigma / alpha``, > 0; used where that of the process is smaller.
        sigma_max: largest, > ``sigma_min``; used where that of the process is larger.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """Linear between the logarithms."""
        low, high = noise_range(process, self.sigma_min, self.sigma_max)
        return process.t_from_lam(-(low.log() + u * (high / low).log()))


@dataclass(frozen=True)
class KarrasTimes(TimeSampler):
    """``sigma / alpha`` at a random one of ``steps`` points of Karras et al.'s grid.

    Args:
        steps: number of points, >= 2.
        rho: curvature of the grid, > 0.
        skip: points, counted from 0, lie between ``skip * steps`` and ``(1 - skip) * steps``, in [0, 0.5).
        sigma_min: smallest noise, > 0.
        sigma_max: largest noise.

    Raises:
        ValueError: an argument out of range.
    """

    steps: int = 1000
    rho: float = 7.0
    skip: float = 0.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if self.steps < 2:
            raise ValueError(f"steps must be >= 2, got {self.steps}")
        if not self.rho > 0:
            raise ValueError(f"rho must be > 0, got {self.rho}")
        if not 0 <= self.skip < 0.5:
            raise ValueError(f"skip must be in [0, 0.5), got {self.skip}")

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """The point of the grid, counted from the least noise."""
        first = round(self.skip * self.steps)
        count = min(self.steps - first, self.steps - 1) - first + 1
        index = first + (u * count).floor().clamp(max=count - 1)
        low, high = (x ** (1 / self.rho) for x in noise_range(process, self.sigma_min, self.sigma_max))
        sigma = (low + index / (self.steps - 1) * (high - low)) ** self.rho
        return process.t_from_lam(-sigma.log())


@dataclass(frozen=True)
class DiscreteTimes(TimeSampler):
    """A random one of ``steps`` equally spaced times, as DDPM trains; the first is ``t_max / steps``.

    Args:
        steps: number of times, >= 1.

    Raises:
        ValueError: an argument out of range.
    """

    steps: int = 1000

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """``t_max (1 + floor(u steps)) / steps``."""
        return process.t_max * (1 + (u * self.steps).floor().clamp(max=self.steps - 1)) / self.steps


TIME_SAMPLERS: dict[str, type[TimeSampler]] = {
    "uniform": UniformTimes,
    "lognormal_sigma": LognormalSigma,
    "logit_normal": LogitNormal,
    "shifted": ShiftedTimes,
    "lambda_uniform": UniformLambda,
    "karras_grid": KarrasTimes,
    "discrete": DiscreteTimes,
}


def as_time_sampler(sampler: str | TimeSampler) -> TimeSampler:
    """The sampler that a name stands for, such as ``uniform``, ``logit_normal`` or ``lognormal_sigma``."""
    return named("time_sampler", sampler, TIME_SAMPLERS, TimeSampler)


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"std must be > 0, got {std}")
