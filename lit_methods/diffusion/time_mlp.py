"""A small network of noisy samples and times, for data without neighbourhoods: points, 8x8 digits, latents."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TimeMLP(nn.Module):
    """Residual multilayer perceptron on flattened samples, told of one or two times and of a condition.

    Each block adds ``Linear(SiLU(LayerNorm(h) + Linear(times and condition)))``. Times enter as
    ``sin(k pi t / 4), cos(k pi t / 4)``, which suits times in [0, 4], as those of all processes but ``edm`` (with
    ``precondition="edm"`` these too).

    Args:
        shape: shape of one sample.
        width: width of the hidden layers, >= 1.
        blocks: number of residual blocks, >= 1.
        frequencies: number of sines, and of cosines, for each time, >= 1.
        num_classes: number of class labels that may be given as ``cond``, without the null one; ``None``: none.
        cond_features: length of vectors that may be given as ``cond``; ``None``: none.
        two_times: whether there is a second time ``s``, as flow maps need it; it enters as ``t - s``.

    Raises:
        ValueError: an argument out of range.
    """

    frequencies: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 256,
        blocks: int = 3,
        frequencies: int = 16,
        num_classes: int | None = None,
        cond_features: int | None = None,
        two_times: bool = False,
    ) -> None:
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(f"shape must hold sizes >= 1, got {list(shape)}")
        if min(width, blocks, frequencies) < 1:
            raise ValueError(f"width, blocks and frequencies must be >= 1, got {width}, {blocks} and {frequencies}")
        if num_classes is not None and cond_features is not None:
            raise ValueError(
                f"num_classes must be None where cond_features={cond_features} is given, got {num_classes}"
            )
        features, self.two_times = math.prod(shape), two_times
        self.sample_shape = list(shape)
        self.feature_layers = [f"blocks.{blocks - 1}"]
        told = 2 * frequencies * (2 if two_times else 1)
        self.register_buffer("frequencies", torch.arange(1, frequencies + 1) * (math.pi / 4), persistent=False)
        self.inner = nn.Linear(features, width)
        self.times = nn.Linear(told, width)
        self.cond: nn.Module | None = None
        if num_classes is not None:
            self.cond = nn.Embedding(num_classes + 1, width)
        elif cond_features is not None:
            self.cond = nn.Linear(cond_features, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, features))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """A prediction for ``x``.

        Args:
            x: noisy samples ``(batch, ...)``.
            t: times ``(batch,)``.
            cond: labels ``(batch,)`` or vectors ``(batch, cond_features)``; left out for a model without condition.
            s: second times ``(batch,)`` of a network with two.
        """
        times = self._waves(t) if s is None else torch.cat([self._waves(t), self._waves(t - s)], 1)
        told = self.times(times.to(self.times.weight.dtype))
        if cond is not None:
            if self.cond is None:
                raise ValueError("cond must be None for a TimeMLP without num_classes or cond_features")
            told = told + self.cond(cond)
        hidden = self.inner(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, told)
        return self.out(hidden).view_as(x)

    def _waves(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies.to(t.dtype)
        return torch.cat([angles.sin(), angles.cos()], 1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.told = nn.Linear(width, width)
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor, told: Tensor) -> Tensor:
        return hidden + self.linear(nn.functional.silu(self.norm(hidden) + self.told(told)))
