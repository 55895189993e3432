"""Where a solver evaluates the network: falling times from pure noise to the data."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_methods.diffusion.naming import check_finite_fields, named
from lit_methods.diffusion.processes import Process


class Grid(ABC):
    """Chooses the times of a solver's steps."""

    def __post_init__(self) -> None:
        check_finite_fields(self)

    @abstractmethod
    def noisy_times(self, process: Process, steps: int) -> Tensor:
        """The ``steps`` times at which a step begins, float64, falling."""

    def times(self, process: Process, steps: int) -> Tensor:
        """``steps + 1`` falling times; the last is the clean one.

        Args:
            process: whose times.
            steps: number of steps, >= 1.

        Returns:
            float64 ``(steps + 1,)`` on the CPU, all different.

        Raises:
            ValueError: an argument out of range.
        """
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        noisy = self.noisy_times(process, steps)
        return torch.cat([noisy, torch.tensor([process.t_clean], dtype=torch.float64)])


@dataclass(frozen=True)
class UniformGrid(Grid):
    """Steps of equal length in time, or moved towards noise as flow-matching models of large images want it.

    Args:
        shift: times ``u = t / t_max`` become ``shift u / (1 + (shift - 1) u)``, > 0; 1 changes nothing.

    Raises:
        ValueError: an argument out of range.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not self.shift > 0:
            raise ValueError(f"shift must be > 0, got {self.shift}")

    def noisy_times(self, process: Process, steps: int) -> Tensor:
        """``t_max``, then down in equal steps."""
        if math.isinf(process.t_clean):
            u = torch.linspace(1, process.t_min / process.t_max, steps, dtype=torch.float64)
        else:
            u = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
        return process.t_max * (self.shift * u / (1 + (self.shift - 1) * u))


@dataclass(frozen=True)
class KarrasGrid(Grid):
    """``(sigma / alpha)^(1 / rho)`` falls in equal steps (Karras et al. 2022); the first time is ``t_max``.

    Args:
        rho: the larger, the shorter are steps at little noise, > 0.
        sigma_min: smallest ``sigma / alpha`` before the data, > 0; not below that of the process.
        sigma_max: largest, where the process itself begins with pure noise.

    Raises:
        ValueError: an argument out of range.
    """

    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not self.rho > 0:
            raise ValueError(f"rho must be > 0, got {self.rho}")
        _check_noise(self.sigma_min, self.sigma_max)

    def noisy_times(self, process: Process, steps: int) -> Tensor:
        """Equal steps in the power ``1 / rho``."""
        low, high = noise_range(process, self.sigma_min, self.sigma_max)
        roots = torch.linspace(1, 0, steps, dtype=torch.float64)
        sigma = (low ** (1 / self.rho) + roots * (high ** (1 / self.rho) - low ** (1 / self.rho))) ** self.rho
        return _from_start(process, process.t_from_lam(-sigma.log()))


@dataclass(frozen=True)
class LambdaGrid(Grid):
    """``log(alpha / sigma)`` rises in equal steps (DPM-Solver); the first time is ``t_max``.

    Args:
        sigma_min: smallest ``sigma / alpha`` before the data, > 0; not below that of the process.
        sigma_max: largest, where the process itself begins with pure noise.

    Raises:
        ValueError: an argument out of range.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        _check_noise(self.sigma_min, self.sigma_max)

    def noisy_times(self, process: Process, steps: int) -> Tensor:
        """Equal steps in the logarithm."""
        low, high = noise_range(process, self.sigma_min, self.sigma_max)
        lam = -high.log() + torch.linspace(0, 1, steps, dtype=torch.float64) * (high / low).log()
        return _from_start(process, process.t_from_lam(lam))


GRIDS: dict[str, type[Grid]] = {"uniform": UniformGrid, "karras": KarrasGrid, "lambda": LambdaGrid}


def as_grid(grid: str | Grid | None, process: Process) -> Grid:
    """The grid that a name stands for: ``uniform karras lambda``; ``None`` for the one that suits the process."""
    return named("grid", process.grid if grid is None else grid, GRIDS, Grid)


def check_path(times: Sequence[float] | Tensor, process: Process) -> Tensor:
    """A user's own times as float64 on the CPU.

    Raises:
        ValueError: fewer than two, not falling, or outside of the process.
    """
    times = torch.as_tensor(times, dtype=torch.float64).cpu()
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
        raise ValueError(f"times must be two or more falling numbers, got {times.tolist()}")
    process.check_times(times)
    return times


def noise_range(process: Process, sigma_min: float, sigma_max: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest ``sigma / alpha`` of a process, or the given ones where its own are 0 or infinite."""
    low = (-process.lam(process.t_min)).exp()
    high = (-process.lam(process.t_max)).exp()
    low = low if 0 < low < math.inf else torch.tensor(sigma_min, dtype=torch.float64)
    high = high if high < math.inf else torch.tensor(sigma_max, dtype=torch.float64)
    return low, high


def _from_start(process: Process, times: Tensor) -> Tensor:
    """Begin at pure noise, exactly: a start just short of it leaves an error that no number of steps removes."""
    times[0] = process.t_max
    return times


def _check_noise(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
