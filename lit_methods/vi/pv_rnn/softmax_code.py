"""Real numbers as distributions over reference points, for outputs that a softmax gives."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class SoftmaxCode:
    """Each number ``x`` in ``[low, high]`` as ``softmax(-(x - r_j)^2 / width)`` over ``units`` even references ``r_j``.

    Decoding takes the mean of the references, which is biased towards the middle at both ends: leave a margin.

    Args:
        low: smallest value, one for all dimensions or one each.
        high: largest value.
        units: references, >= 2.
        width: squared length over which references share a value, > 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, low: float | Sequence[float], high: float | Sequence[float], units: int = 10, width: float = 0.05
    ) -> None:
        self.low, self.high = (torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in (low, high))
        if not (self.high > self.low).all() or not (self.high - self.low).isfinite().all():
            raise ValueError(f"low must be below high, both finite, got {low} and {high}")
        if units < 2:
            raise ValueError(f"units must be >= 2, got {units}")
        if not 0 < width < math.inf:
            raise ValueError(f"width must be > 0 and finite, got {width}")
        self.units, self.width = units, width

    def check_size(self, output_size: int) -> None:
        """Refuse bounds of another number of dimensions."""
        for name, bound in (("low", self.low), ("high", self.high)):
            if len(bound) not in (1, output_size):
                raise ValueError(f"{name} must be one number or {output_size}, got {len(bound)}")

    def references(self, like: Tensor) -> Tensor:
        """``(1 or dimensions, units)``."""
        share = torch.linspace(0, 1, self.units, dtype=torch.float64)
        return (self.low[:, None] + (self.high - self.low)[:, None] * share).to(like)

    def encode(self, x: Tensor) -> Tensor:
        """Values ``(..., dimensions)`` to distributions ``(..., dimensions, units)``.

        Raises:
            ValueError: a value outside ``[low, high]``, with its dimension.
        """
        outside = ((x < self.low.to(x)) | (x > self.high.to(x))).flatten(0, -2)
        if outside.any():
            row, dimension = outside.nonzero()[0].tolist()
            low, high = (float(bound[dimension if len(bound) > 1 else 0]) for bound in (self.low, self.high))
            value = float(x.flatten(0, -2)[row, dimension])
            raise ValueError(f"values must be in [{low:g}, {high:g}] in dimension {dimension}, got {value:g}")
        return (-(x[..., None] - self.references(x)).square() / self.width).softmax(-1)

    def decode(self, code: Tensor) -> Tensor:
        """Distributions ``(..., dimensions, units)`` to values ``(..., dimensions)``."""
        return (code * self.references(code)).sum(-1)
