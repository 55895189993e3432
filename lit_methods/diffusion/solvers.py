"""Solvers from noise to data for any process and any prediction.

A solver gets ``predict(x, t)``, the clean sample that a model sees in ``x``, and a path of nodes: everything
that depends on the times only, as plain numbers computed once in float64. A step is a few multiples of tensors. The
last step of every solver, into ``sigma = 0``, returns the prediction; the first, out of ``alpha = 0``, is exact.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lit_methods.diffusion.naming import check_finite_fields, named
from lit_methods.diffusion.predictions import mix
from lit_methods.diffusion.processes import Point, Process

Predict = Callable[[Tensor, float], Tensor]
Noise = Callable[[Tensor], Tensor]


class Node(NamedTuple):
    """A time of a path and where the process is there, in plain numbers."""

    t: float
    point: Point

    @property
    def lam(self) -> float:
        """``log(alpha / sigma)``, infinite at either end."""
        if self.point.alpha == 0 or self.point.sigma == 0:
            return -math.inf if self.point.alpha == 0 else math.inf
        return math.log(self.point.alpha) - math.log(self.point.sigma)

    @property
    def ratio(self) -> float:
        """``sigma / alpha``."""
        return math.exp(-self.lam)


def nodes(process: Process, times: Tensor) -> list[Node]:
    """The nodes of float64 times."""
    rows = torch.stack([value.expand(times.shape) for value in process.at(times)], 1).tolist()
    return [Node(t, Point(*row)) for t, row in zip(times.tolist(), rows, strict=True)]


class Solver(ABC):
    """Moves samples along a path of a process."""

    def __post_init__(self) -> None:
        check_finite_fields(self)

    @abstractmethod
    def solve(self, predict: Predict, x: Tensor, path: list[Node], process: Process, noise: Noise) -> Tensor:
        """Samples at the end of the path.

        Args:
            predict: the clean sample for ``x`` at a time.
            x: samples at the path's first time.
            path: where to go, two nodes or more.
            process: the process of the path.
            noise: standard normal noise shaped like its argument; not called by solvers of the ODE.
        """


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM: exact when the predicted clean sample does not change along a step (arXiv 2010.02502); first order.

    The same as Euler's method for ``x / alpha`` in ``sigma / alpha``, and as DPM-Solver++ of order 1.

    Args:
        eta: share of fresh noise in each step, >= 0: 0 solves the ODE, 1 is ancestral sampling (DDPM).

    Raises:
        ValueError: an argument out of range.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        _check_eta(self.eta)

    def solve(self, predict: Predict, x: Tensor, path: list[Node], process: Process, noise: Noise) -> Tensor:
        """``x <- alpha x_0 + sqrt(sigma^2 - up^2) eps + up z``, ``up = eta sigma sqrt(1 - exp(-2 h))``."""
        for here, there in pairwise(path):
            x0 = predict(x, here.t)
            up = self.eta * there.point.sigma * math.sqrt(-math.expm1(-2 * (there.lam - here.lam)))
            down = math.sqrt(max(there.point.sigma**2 - up**2, 0.0))
            keep = down / here.point.sigma
            x = mix(keep, x, there.point.alpha - keep * here.point.alpha, x0)
            if up > 0:
                x = x + up * noise(x)
        return x


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++ (arXiv 2211.01095) of order 1 or 2 (multistep), for the ODE or the SDE.

    Args:
        order: 1 or 2. Order 2 extrapolates the clean sample from the last step; one call of the model a step.
        eta: 0 solves the ODE, 1 the reverse SDE, between them less noise, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    order: int = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order}")
        _check_eta(self.eta)

    def solve(self, predict: Predict, x: Tensor, path: list[Node], process: Process, noise: Noise) -> Tensor:
        """``x <- (sigma_r / sigma_t) exp(-eta^2 h) x + alpha_r (1 - exp(-(1 + eta^2) h)) D + noise``."""
        before: tuple[Tensor, float] | None = None
        for here, there in pairwise(path):
            x0 = predict(x, here.t)
            h = there.lam - here.lam
            extrapolated = x0
            if self.order == 2 and before is not None and there.point.sigma > 0:
                # The weight of the difference is h / (2 h of the last step): 0 after a start from pure noise.
                extrapolated = torch.lerp(before[0], x0, 1 + h / (2 * before[1]))
            keep = there.point.sigma / here.point.sigma * _decay(self.eta**2, h)
            x = mix(keep, x, -there.point.alpha * math.expm1(-(1 + self.eta**2) * h), extrapolated)
            spread = there.point.sigma * math.sqrt(1 - _decay(2 * self.eta**2, h))
            if spread > 0:
                x = x + spread * noise(x)
            before = x0, h
        return x


@dataclass(frozen=True)
class Euler(Solver):
    """Euler's method for ``dx/dt`` = flow in the process's own time; first order."""

    def solve(self, predict: Predict, x: Tensor, path: list[Node], process: Process, noise: Noise) -> Tensor:
        """``x <- x + (r - t) flow``."""
        for here, there in pairwise(path):
            x0 = predict(x, here.t)
            of_x0, of_x = _flow_factors(here)
            dt = there.t - here.t
            x = x0 if there.point.sigma == 0 else mix(1 + dt * of_x, x, dt * of_x0, x0)
        return x


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method: the mean of the slopes at both ends; second order, two calls of the model a step but the last.

    Args:
        coordinates: ``"time"`` for ``dx/dt`` in the process's own time; ``"edm"`` for ``x / alpha`` in
            ``sigma / alpha``, as Karras et al. (2022) do, which wants their grid.

    Raises:
        ValueError: an argument out of range.
    """

    coordinates: str = "time"

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if self.coordinates not in ("time", "edm"):
            raise ValueError(f"coordinates must be 'time' or 'edm', got {self.coordinates!r}")

    def solve(self, predict: Predict, x: Tensor, path: list[Node], process: Process, noise: Noise) -> Tensor:
        """A step of Euler, then one with the mean slope."""
        for here, there in pairwise(path):
            step = _heun_in_time if self.coordinates == "time" else _heun_in_ratio
            x = step(predict, x, here, there)
        return x


@dataclass(frozen=True)
class Churn(Solver):
    """Heun with fresh noise before each step (Karras et al. 2022, algorithm 2).

    Args:
        churn: total amount of fresh noise ``S_churn``, >= 0; 0 is :class:`Heun`.
        s_min: smallest ``sigma / alpha`` at which noise is added, >= 0.
        s_max: largest, > ``s_min``.
        s_noise: standard deviation of the added noise, > 0.

    Raises:
        ValueError: an argument out of range.
    """

    churn: float = 40.0
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.003

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not self.churn >= 0:
            raise ValueError(f"churn must be >= 0, got {self.churn}")
        if not 0 <= self.s_min < self.s_max:
            raise ValueError(f"s_min and s_max must be 0 <= s_min < s_max, got {self.s_min} and {self.s_max}")
        if not self.s_noise > 0:
            raise ValueError(f"s_noise must be > 0, got {self.s_noise}")

    def solve(self, predict: Predict, x: Tensor, path: list[Node], process: Process, noise: Noise) -> Tensor:
        """Raise ``sigma / alpha`` by a factor, then take a step of Heun from there."""
        gamma = min(self.churn / (len(path) - 1), math.sqrt(2) - 1)
        highest = path[0].ratio
        for here, there in pairwise(path):
            raised = min((1 + gamma) * here.ratio, highest)
            if self.s_min <= here.ratio <= self.s_max and raised > here.ratio:
                t = process.t_from_lam(torch.tensor([-math.log(raised)], dtype=torch.float64))
                (noisier,) = nodes(process, t)
                grown = noisier.point.alpha / here.point.alpha
                x = grown * x
                x = x + noisier.point.alpha * self.s_noise * math.sqrt(raised**2 - here.ratio**2) * noise(x)
                here = noisier
            x = _heun_in_ratio(predict, x, here, there)
        return x


SOLVERS: dict[str, Callable[[], Solver]] = {
    "euler": Euler,
    "heun": Heun,
    "ddim": DDIM,
    "ancestral": lambda: DDIM(eta=1.0),
    "dpmpp_2m": DPMSolverPP,
    "sde_dpmpp": lambda: DPMSolverPP(order=1, eta=1.0),
    "sde_dpmpp_2m": lambda: DPMSolverPP(eta=1.0),
    "edm_churn": Churn,
}


def as_solver(solver: str | Solver) -> Solver:
    """The solver of a name: ``euler heun ddim ancestral dpmpp_2m sde_dpmpp sde_dpmpp_2m edm_churn``."""
    return named("solver", solver, SOLVERS, Solver)


def _flow_factors(node: Node) -> tuple[float, float]:
    """``(a, b)`` of the velocity ``a x_0 + b x``."""
    alpha, sigma, d_alpha, d_sigma = node.point
    return d_alpha - alpha * d_sigma / sigma, d_sigma / sigma


def _flow(x: Tensor, x0: Tensor, node: Node) -> Tensor:
    a, b = _flow_factors(node)
    return mix(a, x0, b, x)


def _heun_in_time(predict: Predict, x: Tensor, here: Node, there: Node) -> Tensor:
    x0 = predict(x, here.t)
    if there.point.sigma == 0:
        return x0
    slope, dt = _flow(x, x0, here), there.t - here.t
    guess = x + dt * slope
    return x + 0.5 * dt * (slope + _flow(guess, predict(guess, there.t), there))


def _heun_in_ratio(predict: Predict, x: Tensor, here: Node, there: Node) -> Tensor:
    x0 = predict(x, here.t)
    keep = there.point.sigma / here.point.sigma
    guess = mix(keep, x, there.point.alpha - keep * here.point.alpha, x0)
    if there.point.sigma == 0 or here.point.alpha == 0:
        return guess
    # d(x / alpha) / d(sigma / alpha) is the predicted noise; its mean over both ends adds half of the difference.
    noise = (x - here.point.alpha * x0) / here.point.sigma
    after = (guess - there.point.alpha * predict(guess, there.t)) / there.point.sigma
    return guess + 0.5 * there.point.alpha * (there.ratio - here.ratio) * (after - noise)


def _decay(rate: float, h: float) -> float:
    """``exp(-rate h)``, also where ``h`` is infinite."""
    return 1.0 if rate == 0 else math.exp(-rate * h)


def _check_eta(eta: float) -> None:
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be >= 0, got {eta}")
