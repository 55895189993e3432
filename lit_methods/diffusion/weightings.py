"""Loss weights as functions of the time, and their conversion between predictions.

A weight belongs to a prediction: "SNR for a network that predicts the clean sample" and "1 for one that predicts the
noise" are the same loss. Each weighting states its own; :meth:`Weighting.in_space` gives it for any other.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lit_methods.diffusion.naming import check_finite_fields, named
from lit_methods.diffusion.predictions import check_prediction, determinant
from lit_methods.diffusion.processes import Point, Process

_SMALLEST = 1e-15


class Weighting(ABC):
    """A weight ``w(t)`` of the squared error, stated for one prediction.

    Attributes:
        space: the prediction whose error it weighs; ``None``: whatever the network predicts.
    """

    def __post_init__(self) -> None:
        check_finite_fields(self)

    space: ClassVar[str | None]

    @abstractmethod
    def weight(self, point: Point, sigma_data: float) -> Any:
        """The weight in its own space."""

    def in_space(self, prediction: str, process: Process, t: Tensor, sigma_data: float = 0.5) -> Tensor:
        """The weight of the squared error of ``prediction``, shaped like ``t``.

        Args:
            prediction: ``x0 epsilon score flow v_prediction edm``.
            process: the path.
            t: times of any shape.
            sigma_data: standard deviation of the data.

        Raises:
            ValueError: an unknown prediction.
        """
        check_prediction("prediction", prediction)
        point = process.at(t)
        weight = self.weight(point, sigma_data)
        if self.space in (None, prediction):
            return weight + 0 * point.alpha
        # At fixed x an error of one prediction is that of another times the ratio of determinants.
        own = determinant(str(self.space), point, sigma_data)
        other = determinant(prediction, point, sigma_data)
        return weight * (own / other.abs().clamp(min=_SMALLEST)) ** 2


@dataclass(frozen=True)
class Uniform(Weighting):
    """Weight 1 for what the network predicts: "simple" DDPM for noise, flow matching for the flow.

    Args:
        space: a prediction whose error has weight 1 instead, such as ``x0``.

    Raises:
        ValueError: an unknown prediction.
    """

    space: str | None = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.space is not None:
            check_prediction("space", self.space)

    def weight(self, point: Point, sigma_data: float) -> Any:
        """1."""
        return 1.0


@dataclass(frozen=True)
class SNR(Weighting):
    """Weight ``alpha^2 / sigma^2`` for the clean sample, which is 1 for the noise."""

    space: ClassVar[str | None] = "epsilon"

    def weight(self, point: Point, sigma_data: float) -> Any:
        """1."""
        return 1.0


@dataclass(frozen=True)
class MinSNR(Weighting):
    """Weight ``min(1, gamma / SNR)`` for noise, which is ``min(SNR, gamma)`` for the clean sample (arXiv 2303.09556).

    With a path that ends in pure noise the weight of ``x0`` and ``v_prediction`` falls to 0 there, as intended.

    Args:
        gamma: where the weight of the clean sample stops growing, > 0.

    Raises:
        ValueError: an argument out of range.
    """

    gamma: float = 5.0
    space: ClassVar[str | None] = "epsilon"

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not self.gamma > 0:
            raise ValueError(f"gamma must be > 0, got {self.gamma}")

    def weight(self, point: Point, sigma_data: float) -> Any:
        """``min(1, gamma sigma^2 / alpha^2)``."""
        return (self.gamma * (point.sigma / point.alpha.clamp(min=_SMALLEST)) ** 2).clamp(max=1)


@dataclass(frozen=True)
class EDMWeight(Weighting):
    """Weight ``(s^2 + sigma_data^2) / (s sigma_data)^2`` for the clean sample, ``s = sigma / alpha``.

    For the prediction ``edm`` it is 1 (Karras et al. 2022, arXiv 2206.00364).
    """

    space: ClassVar[str | None] = "edm"

    def weight(self, point: Point, sigma_data: float) -> Any:
        """1."""
        return 1.0


@dataclass(frozen=True)
class Likelihood(Weighting):
    """Weight ``g^2`` for the score: the loss bounds the negative log-likelihood (arXiv 2101.09258)."""

    space: ClassVar[str | None] = "score"

    def weight(self, point: Point, sigma_data: float) -> Any:
        """``g^2 = 2 sigma (sigma' - sigma alpha' / alpha)``."""
        return 2 * point.sigma * (point.d_sigma - point.sigma * point.d_alpha / point.alpha.clamp(min=_SMALLEST))


@dataclass(frozen=True)
class SigmoidWeight(Weighting):
    """Weight ``sigmoid(bias - log SNR)`` for noise (Kingma and Gao, arXiv 2303.00848).

    Args:
        bias: shifts the weight towards less noise the larger it is.
    """

    bias: float = 2.0
    space: ClassVar[str | None] = "epsilon"

    def weight(self, point: Point, sigma_data: float) -> Any:
        """``1 / (1 + exp(-bias) SNR)``."""
        snr = (point.alpha / point.sigma.clamp(min=_SMALLEST)) ** 2
        return 1 / (1 + snr * math.exp(-self.bias))


@dataclass(frozen=True)
class P2(Weighting):
    """Weight ``1 / (k + SNR)^gamma`` for noise (arXiv 2204.00227).

    Args:
        k: keeps the weight finite, > 0.
        gamma: how much noisy times are preferred, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    k: float = 1.0
    gamma: float = 1.0
    space: ClassVar[str | None] = "epsilon"

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not self.k > 0:
            raise ValueError(f"k must be > 0, got {self.k}")
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be >= 0, got {self.gamma}")

    def weight(self, point: Point, sigma_data: float) -> Any:
        """``1 / (k + SNR)^gamma``."""
        return (self.k + (point.alpha / point.sigma.clamp(min=_SMALLEST)) ** 2) ** -self.gamma


WEIGHTINGS: dict[str, type[Weighting]] = {
    "uniform": Uniform,
    "snr": SNR,
    "min_snr": MinSNR,
    "edm": EDMWeight,
    "likelihood": Likelihood,
    "sigmoid": SigmoidWeight,
    "p2": P2,
}


def as_weighting(weighting: str | Weighting) -> Weighting:
    """The weighting that a name stands for: ``uniform snr min_snr edm likelihood sigmoid p2``."""
    return named("weighting", weighting, WEIGHTINGS, Weighting)
