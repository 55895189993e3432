"""A posterior on a ring: figure 2 and table 4 of the paper."""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal, Uniform

from lit_methods.batches import ObservationBatch
from lit_methods.vi.programmable.programs import observe, sample


class ConeModel(nn.Module):
    """``x, y ~ N(0, 10)``, ``z ~ N(x^2 + y^2, 0.1 + (x^2 + y^2) / 100)``, where z is ``batch.values``.

    The second parameters are standard deviations. The log-evidence of z = 5 is -5.32323.
    """

    def forward(self, batch: ObservationBatch) -> None:
        """One run."""
        x = sample("x", Normal(0.0, 10.0, validate_args=False))
        y = sample("y", Normal(0.0, 10.0, validate_args=False))
        square = x**2 + y**2
        observe("z", Normal(square, 0.1 + square / 100, validate_args=False), batch.values[..., 0])


class NormalGuide(nn.Module):
    """Independent normal x and y: only a piece of the ring.

    Args:
        mean: of x and y at first.
        log_scale: logarithms of their standard deviations at first.
    """

    def __init__(self, mean: tuple[float, float] = (0.0, 0.0), log_scale: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("log_scale", log_scale)):
            if len(values) != 2 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be two finite numbers, got {values}")
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_scale = nn.Parameter(torch.tensor(log_scale))

    def forward(self, batch: ObservationBatch) -> None:
        """One run."""
        scale = self.log_scale.exp()
        for i, name in enumerate("xy"):
            sample(name, Normal(self.mean[i], scale[i], validate_args=False))


class RingGuide(nn.Module):
    """A random angle, and normal noise around its point of the ring; the angle is to be summed out by ``marginal``.

    Args:
        log_scale: logarithms of the standard deviations of x and y at first.
    """

    def __init__(self, log_scale: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        if len(log_scale) != 2 or not all(math.isfinite(value) for value in log_scale):
            raise ValueError(f"log_scale must be two finite numbers, got {log_scale}")
        self.log_scale = nn.Parameter(torch.tensor(log_scale))

    def forward(self, batch: ObservationBatch) -> None:
        """One run."""
        zero = batch.values.new_zeros(())  # on the data's device, where numbers would draw on the CPU
        angle = 2 * math.pi * sample("u", Uniform(zero, zero + 1, validate_args=False))
        radius = batch.values[..., 0].sqrt()
        scale = self.log_scale.exp()
        for i, (name, direction) in enumerate((("x", torch.cos), ("y", torch.sin))):
            point: Tensor = radius * direction(angle)
            sample(name, Normal(point, scale[i], validate_args=False))
