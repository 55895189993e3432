"""Geometric Brownian motion, whose logarithm is a variance-exploding process.

``dX = mu X dt + sigma X dW`` (Ito) has the closed form ``X_t = X_0 exp(M(t) + sqrt(V(t)) Z)`` with ``V = int sigma^2``
and ``M = int mu - V / 2``. So in the coordinate ``y = log X_t - M(t)`` it is ``y_t = y_0 + sqrt(V(t)) Z``, with the
score ``h + 1``, where ``h = x grad log p`` is the Hyvarinen score of the paper. All solvers, predictions and weights of
this package therefore apply in ``y``; nothing else is written for the multiplicative model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_methods.diffusion.processes import Point, Process, per_sample
from lit_methods.diffusion.time_samplers import TimeSampler
from lit_methods.diffusion.weightings import Weighting

Rate = Callable[[Tensor], Tensor]
_NODES = 10_001


@dataclass(frozen=True)
class GeometricBrownian(Process):
    """Multiplicative noise on positive data, as a process of ``y = (log x - M(t)) / scale``.

    The mean of ``X_t`` is ``x_0 exp(int mu)``, its median ``x_0 exp(M)``, the variance of its logarithm ``V``. With the
    paper's ``mu = sigma^2 / 2`` there is no drift in ``log x``. Where sigma differs by channel, ``scale`` is that
    of the channel and ``V = t``; else it is 1.

    Args:
        mu: rate of growth, a number or a function of times (float64 tensor) in [0, t_max].
        volatility: sigma, the strength of the noise, > 0: a number, a function of times, or one number for each
            channel, the first dimension of a sample.
        t_max: last time, > 0.
        t_min: smallest time to train at, in (0, t_max); the paper's is ``1 / 1000``.

    Raises:
        ValueError: an argument out of range.
    """

    mu: float | Rate = 0.32
    volatility: float | Sequence[float] | Rate = 0.8
    t_max: float = 1.0
    t_min: float = 1e-3
    _tables: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.t_max < math.inf:
            raise ValueError(f"t_max must be > 0, got {self.t_max}")
        if not 0 < self.t_min < self.t_max:
            raise ValueError(f"t_min must be in (0, {self.t_max:g}), got {self.t_min}")
        times = torch.linspace(0, self.t_max, _NODES, dtype=torch.float64)
        for name, rate in (("mu", self.mu), ("volatility", self.volatility)):
            values = torch.as_tensor(rate(times) if callable(rate) else rate, dtype=torch.float64)
            if not values.isfinite().all() or (name == "volatility" and not (values > 0).all()):
                least = "" if name == "mu" else "> 0 and "
                raise ValueError(f"{name} must be {least}finite, got {rate if not callable(rate) else values.tolist()}")
            if callable(rate):
                steps = torch.cumulative_trapezoid(values.expand(_NODES) ** (2 if name == "volatility" else 1), times)
                self._tables[name] = torch.cat([steps.new_zeros(1), steps])

    def at(self, t: Tensor | float) -> Point:
        """``alpha = 1``, ``sigma = sqrt(V)``."""
        t = torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t
        t = t if t.dtype == torch.float64 else t.float()
        sigma = self._variance(t).sqrt()
        return Point(torch.ones_like(t), sigma, torch.zeros_like(t), self._variance_rate(t) / (2 * sigma))

    def t_from_lam(self, lam: Tensor) -> Tensor:
        """The time at which ``V`` is ``exp(-2 lam)``."""
        variance = (-2 * lam).exp()
        if "volatility" in self._tables:
            return _interpolate(variance, self._tables["volatility"].to(variance.device), self._times(variance))
        return variance / self._constant_rate

    def growth(self, t: Tensor) -> Tensor:
        """The integral of ``mu`` up to ``t``: the logarithm of how much the mean has grown."""
        if "mu" in self._tables:
            return _interpolate(t, self._times(t), self._tables["mu"].to(t.device))
        return float(self.mu) * t  # type: ignore[arg-type]

    def drift_and_scale(self, t: Tensor | float, x: Tensor) -> tuple[Any, Any]:
        """``M(t)`` and the scale of ``y``, shaped to broadcast against samples ``x`` ``(batch, ...)``."""
        t = torch.as_tensor(t, dtype=torch.float32 if x.dtype != torch.float64 else torch.float64, device=x.device)
        growth = per_sample(self.growth(t), x)
        scale: Any = 1.0
        if isinstance(self.volatility, Sequence):
            if x.shape[1] != len(self.volatility):
                raise ValueError(
                    f"volatility must hold one number for each of {x.shape[1]} channels, got {self.volatility}"
                )
            scale = torch.tensor(self.volatility, dtype=t.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2))
        return growth - 0.5 * scale**2 * per_sample(self._variance(t), x), scale

    def to_log(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Coordinates ``y`` of positive samples ``(batch, ...)`` at times ``(batch,)`` or a single one."""
        drift, scale = self.drift_and_scale(t, x)
        return (x.log() - drift) / scale

    def from_log(self, y: Tensor, t: Tensor | float) -> Tensor:
        """Positive samples of coordinates ``y``."""
        drift, scale = self.drift_and_scale(t, y)
        return (drift + scale * y).exp()

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``X_t`` of positive data ``(batch, ...)`` and standard normal noise, at times ``(batch,)``."""
        return self.from_log(self.add_noise(self.to_log(x0, 0.0), eps, t), t)

    def hyvarinen(self, eps: Tensor, t: Tensor | float) -> Tensor:
        """``h = x grad log p = -1 - eps / (scale sqrt(V))``, from the noise in ``y``."""
        return -1 - eps / self._spread(t, eps)

    def noise(self, h: Tensor, t: Tensor | float) -> Tensor:
        """The noise in ``y`` of a Hyvarinen score; undoes :meth:`hyvarinen`."""
        return -(h + 1) * self._spread(t, h)

    def _spread(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Standard deviation of ``log X_t``."""
        t = torch.as_tensor(t, dtype=torch.float32 if x.dtype != torch.float64 else torch.float64, device=x.device)
        return self.drift_and_scale(t, x)[1] * per_sample(self._variance(t).sqrt(), x)

    @property
    def _constant_rate(self) -> float:
        return 1.0 if isinstance(self.volatility, Sequence) else float(self.volatility) ** 2  # type: ignore[arg-type]

    def _variance(self, t: Tensor) -> Tensor:
        if "volatility" in self._tables:
            return _interpolate(t, self._times(t), self._tables["volatility"].to(t.device))
        return self._constant_rate * t

    def _variance_rate(self, t: Tensor) -> Tensor:
        return self.volatility(t) ** 2 if callable(self.volatility) else torch.full_like(t, self._constant_rate)

    def _times(self, like: Tensor) -> Tensor:
        return torch.linspace(0, self.t_max, _NODES, dtype=torch.float64, device=like.device)


@dataclass(frozen=True)
class PowerTimes(TimeSampler):
    """``t_max u^power`` for uniform ``u``: the larger the power, the more times near the data.

    Args:
        power: > 0; 1 is uniform.

    Raises:
        ValueError: ``power`` out of range.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise ValueError(f"power must be > 0, got {self.power}")

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """``t_max u^power``."""
        return process.t_max * u**self.power


@dataclass(frozen=True)
class NoiseVariance(Weighting):
    """Weight ``sigma^2`` for noise, which is 1 for the clean sample where ``alpha = 1``.

    With :class:`GeometricBrownian` it is ``(sigma^2 t)^2`` for the Hyvarinen score, the loss of the authors of *Dale
    meets Langevin*.
    """

    space: ClassVar[str | None] = "epsilon"

    def weight(self, point: Point, sigma_data: float) -> Any:
        """``sigma^2``."""
        return point.sigma**2


def _interpolate(at: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Linear interpolation of the table ``(xs, ys)``, both rising; continued beyond its end."""
    wide = at.double()
    right = torch.searchsorted(xs, wide.contiguous()).clamp(1, len(xs) - 1)
    share = (wide - xs[right - 1]) / (xs[right] - xs[right - 1])
    return torch.lerp(ys[right - 1], ys[right], share).to(at.dtype)
