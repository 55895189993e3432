"""A network's view of positive data, as a network that predicts the noise of its logarithm."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods.diffusion.dale_langevin.process import GeometricBrownian
from lit_methods.diffusion.processes import per_sample

PREDICTIONS = ("epsilon", "hyvarinen", "stein")
INPUTS = ("log", "x")
PRIORS = ("scalar", "channel", "pixel")


class LogNetwork(nn.Module):
    """Wraps ``net`` for a :class:`Denoiser` of prediction "epsilon" on the process.

    Args:
        net: ``net(seen, time)``, or ``net(seen, time, cond)``, that gives a prediction shaped like ``seen``.
        shape: shape of one sample.
        process: the multiplicative noise.
        prediction: what ``net`` predicts: "epsilon" the noise, "hyvarinen" ``x grad log p``, "stein" ``grad log p``.
        network_input: what it sees: "log", ``y`` standardised by the moments, and where ``log t`` lies between that of
            ``t_min`` (0) and that of ``t_max`` (1); "x", the positive sample itself and ``t``.
        prior: whether the moments are one number each ("scalar"), by "channel" or by "pixel".

    Attributes:
        log_mean: mean of ``y_0``.
        log_variance: its variance.
        log_count: rows that they were computed from; 0 until they are known.

    Raises:
        ValueError: an argument out of range.
    """

    log_mean: Tensor
    log_variance: Tensor
    log_count: Tensor

    def __init__(
        self,
        net: nn.Module,
        shape: Sequence[int],
        process: GeometricBrownian,
        prediction: str = "epsilon",
        network_input: str = "log",
        prior: str = "pixel",
    ) -> None:
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(f"shape must hold sizes >= 1, got {list(shape)}")
        for name, value, choices in (
            ("prediction", prediction, PREDICTIONS),
            ("network_input", network_input, INPUTS),
            ("prior", prior, PRIORS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")
        self.net, self.process, self.prediction, self.network_input = net, process, prediction, network_input
        by = {"scalar": [], "channel": [shape[0], *[1] * (len(shape) - 1)], "pixel": list(shape)}[prior]
        self.register_buffer("log_mean", torch.zeros(by))
        self.register_buffer("log_variance", torch.ones(by))
        self.register_buffer("log_count", torch.zeros(()))

    def forward(self, y: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The noise in ``y`` ``(batch, ...)`` at times ``(batch,)``.

        The network is never asked nearer to the data than it was trained.
        """
        t = t.clamp(min=self.process.t_min)
        x = self.process.from_log(y, t)
        seen, time = x, t
        if self.network_input == "log":
            seen = (y - self.log_mean) / self.spread(t, y)
            time = 1 + (t / self.process.t_max).log() / math.log(self.process.t_max / self.process.t_min)
        seen = seen.to(y.dtype)
        out = self.net(seen, time) if cond is None else self.net(seen, time, cond)
        if self.prediction == "epsilon":
            return out
        return self.process.noise(out if self.prediction == "hyvarinen" else x * out, t)

    def spread(self, t: Tensor, y: Tensor) -> Tensor:
        """Standard deviation of ``y_t``."""
        return (self.log_variance + per_sample(self.process.sigma(t) ** 2, y)).sqrt()

    def set_moments(self, count: Tensor, total: Tensor, squares: Tensor) -> None:
        """Take mean and variance from sums over rows, pixel by pixel.

        Args:
            count: number of rows.
            total: sum of ``y_0`` over them, shaped like a sample.
            squares: sum of squares, likewise.
        """
        mean, square = total / count, squares / count
        if self.log_mean.ndim == 0:
            mean, square = mean.mean(), square.mean()
        elif self.log_mean.shape != mean.shape:
            others = list(range(1, mean.ndim))
            mean, square = mean.mean(others, keepdim=True), square.mean(others, keepdim=True)
        self.log_mean.copy_(mean)
        self.log_variance.copy_((square - mean**2).clamp(min=0))
        self.log_count.copy_(count)


def log_moments(batches: Any, process: GeometricBrownian) -> tuple[Tensor, Tensor, Tensor]:
    """Sums for :meth:`LogNetwork.set_moments` in float64: count, sum and sum of squares of ``y_0`` over the rows.

    Args:
        batches: positive samples ``(batch, ...)``, one tensor after the other.
        process: whose coordinate ``y`` is.
    """
    count, total, squares = torch.zeros((), dtype=torch.float64), None, None
    for x in batches:
        y = process.to_log(x.detach().cpu().double(), 0.0)
        count += len(y)
        total = y.sum(0) if total is None else total + y.sum(0)
        squares = y.square().sum(0) if squares is None else squares + y.square().sum(0)
    if total is None or squares is None:
        raise ValueError("batches must hold at least one, got none")
    return count, total, squares
