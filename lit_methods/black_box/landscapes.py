"""Functions with many local minima: what global optimizers are tried on. The global minimum of each is 0, at 0."""

import math

import torch
from torch import Tensor, nn

__all__ = ["Ackley", "GrandCanyon", "Rastrigin"]


class GrandCanyon(nn.Module):
    """The noisy canyon of arXiv 2306.09778 (authors' code: ``GrandCanyon3noisy``), in two dimensions.

    A steep valley leads from (8, 8) down to the global minimum, over local minima and a barrier; gradient descent stops
    at (2.336, 2.465), where the value is 3.86.

    Shape:
        ``(..., 2)`` -> ``(...)``.
    """

    def forward(self, points: Tensor) -> Tensor:
        """Values at ``points``."""
        x, y = points[..., 0], points[..., 1]
        side = y - (2 / 16 * (x - 1) * (x - 4) ** 2 + 2)
        below = -x - 1.6 * y
        valley = 25 * (1 - torch.exp(-1.4 * side**2 * torch.exp(-0.002 * x**4)))
        ripples = 1.1625 * (1 - torch.cos(0.75 * math.pi * points)).sum(-1)
        barrier = 4 * torch.exp(1 - 2 * side**4) * ((1 - torch.exp(-9 * below**2)) * below.sign()).clamp(min=0)
        return valley + 0.4 * x**2 + 0.2 * y**2 + ripples + barrier


class Rastrigin(nn.Module):
    """``sum_j x_j^2 + height (1 - cos 2 pi x_j)``: a local minimum near every integer point.

    Args:
        height: of the ripples, > 0: 2.5 in arXiv 2306.09778, 10 in Rastrigin's own.

    Shape:
        ``(..., d)`` -> ``(...)``.

    Raises:
        ValueError: ``height`` is not > 0.
    """

    def __init__(self, height: float = 2.5) -> None:
        super().__init__()
        if not 0 < height < math.inf:
            raise ValueError(f"height must be > 0 and finite, got {height}")
        self.height = height

    def forward(self, points: Tensor) -> Tensor:
        """Values at ``points``."""
        return (points.square() + self.height * (1 - torch.cos(2 * math.pi * points))).sum(-1)


class Ackley(nn.Module):
    """``20 - 20 exp(-|x| / (5 sqrt d)) + e - exp(mean_j cos 2 pi x_j)``: ripples on a plateau with one deep hole.

    Shape:
        ``(..., d)`` -> ``(...)``.
    """

    def forward(self, points: Tensor) -> Tensor:
        """Values at ``points``."""
        hole = 20 - 20 * torch.exp(-0.2 * points.square().mean(-1).sqrt())
        return hole + math.e - torch.exp(torch.cos(2 * math.pi * points).mean(-1))
