"""Paths of fractional Brownian motion and of what it drives."""

from typing import Literal

import torch
from torch import Tensor

from lit_methods.datamodules.series.shared_times import one_grid, path_rows
from lit_methods.datamodules.tensors import TensorDataModule, check_int
from lit_methods.fractional_noise import check_hurst, check_kind, sample_fbm


class FractionalPathDataModule(TensorDataModule):
    """Noisy observations of fractional Brownian motion, or of ``dX = -rate X dt + scale dB`` that it drives, from 0.

    Fractional Brownian motion is drawn exactly. With a rate, ``X = B - rate int exp(-rate (t - s)) B(s) ds`` is summed
    by trapezoids on a grid ten times as fine. Time 0 is in the batch, not observed. Batches are
    :class:`~lit_methods.batches.PathBatch` with values float32 ``(batch, 1 + num_times, 1)``; unobserved values are
    NaN. ``paths`` holds the same without noise and holes, for all rows in the order training, validation, test.

    Args:
        hurst: Hurst index, in (0, 1).
        kind: "I" (stationary increments) or "II" (starts anew at 0).
        normalize: scale to variance 1 at time 1.
        rate: of mean reversion, >= 0.
        scale: of the noise that drives, > 0.
        num_times: observations per path, >= 1, equally spaced up to ``t_max``.
        t_max: last time, > 0.
        obs_std: standard deviation of the observation noise, >= 0.
        missing: share of observations that are missing at random, in [0, 1).
        train_size: training paths, >= 1.
        val_size: validation paths, >= 0.
        test_size: test paths, >= 0.
        batch_size: paths per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: of paths, noise, holes and order, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        hurst: float = 0.7,
        kind: Literal["I", "II"] = "II",
        normalize: bool = False,
        rate: float = 0.0,
        scale: float = 1.0,
        num_times: int = 40,
        t_max: float = 2.0,
        obs_std: float = 0.05,
        missing: float = 0.0,
        train_size: int = 64,
        val_size: int = 64,
        test_size: int = 64,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, transform=one_grid)
        self.hurst = check_hurst(hurst)
        check_kind(kind)
        self.kind: Literal["I", "II"] = kind
        self.normalize = normalize
        for name, value in (("rate", rate), ("obs_std", obs_std)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"Invalid {name}={value!r}: must be >= 0 and finite.")
        for name, value in (("scale", scale), ("t_max", t_max)):
            if not 0 < value < float("inf"):
                raise ValueError(f"Invalid {name}={value!r}: must be > 0 and finite.")
        if not 0 <= missing < 1:
            raise ValueError(f"Invalid missing={missing!r}: must be in [0, 1).")
        self.rate, self.scale, self.t_max, self.obs_std, self.missing = rate, scale, t_max, obs_std, missing
        self.num_times = check_int("num_times", num_times, 1)
        self.sizes = [
            check_int("train_size", train_size, 1),
            check_int("val_size", val_size, 0),
            check_int("test_size", test_size, 0),
        ]

    def setup(self, stage: str) -> None:
        """Draw the paths."""
        generator = torch.Generator().manual_seed(self.seed)
        fine = 10 if self.rate else 1
        grid = torch.arange(self.num_times * fine + 1, dtype=torch.float64) * (self.t_max / (self.num_times * fine))
        noise = sample_fbm(grid, self.hurst, sum(self.sizes), self.kind, self.normalize, generator=generator)
        self.paths = self.scale * _reverting(noise, self.rate, float(grid[1]))[:, ::fine]
        seen = torch.rand(self.paths.shape, generator=generator) >= self.missing
        seen[:, 0] = False
        values = self.paths + self.obs_std * torch.randn(self.paths.shape, generator=generator, dtype=torch.float64)
        values = torch.where(seen, values, torch.nan).float()[..., None]
        parts = zip(values.split(self.sizes), seen.split(self.sizes), strict=True)
        self.train_data, self.val_data, self.test_data = (path_rows(grid[::fine].float(), *part) for part in parts)


def _reverting(noise: Tensor, rate: float, step: float) -> Tensor:
    """``B - rate int exp(-rate (t - s)) B(s) ds`` by trapezoids."""
    if not rate:
        return noise
    decay = torch.exp(torch.tensor(-rate * step, dtype=torch.float64))
    integral, integrals = torch.zeros_like(noise[:, 0]), [torch.zeros_like(noise[:, 0])]
    for before, now in zip(noise.T[:-1], noise.T[1:], strict=True):
        integral = decay * integral + 0.5 * step * (decay * before + now)
        integrals.append(integral)
    return noise - rate * torch.stack(integrals, 1)
