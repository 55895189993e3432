"""The paper's samplers as solvers of this package, in the coordinate ``y`` of :class:`GeometricBrownian`.

Each updates with ``V = sigma^2 delta``, ``h`` the Hyvarinen score and fresh standard normal ``Z``:

- DLS (Dale-Langevin): ``x <- x exp(V h + 3 V / 2 - mu delta + sqrt(V) Z)``, Euler-Maruyama in ``log x``;
- UMS (sign-agnostic): ``x <- x (1 + 2 V - mu delta + V h + sqrt(V) Z)``, Euler-Maruyama in ``x``.

With ``h + 1`` the score in ``y`` these are ``y <- y + V score + sqrt(V) Z``, and its first-order twin. The ODE in few
steps is the package's ``"ddim"`` or ``"dpmpp_2m"`` on the same process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_methods.diffusion.dale_langevin.process import GeometricBrownian
from lit_methods.diffusion.processes import Process
from lit_methods.diffusion.solvers import Node, Noise, Predict, Solver


class Move(NamedTuple):
    """One update, in numbers.

    Attributes:
        variance: ``V``.
        share: ``V / sigma^2``: how far the mean of ``y`` goes towards the predicted clean sample.
        growth: ``int mu``.
        spread: standard deviation of the noise, annealed.
    """

    variance: float
    share: float
    growth: float
    spread: float


Update = Callable[[Tensor, Tensor, Tensor | None, Move], Tensor]


@dataclass(frozen=True)
class Annealing:
    """The authors' heuristic between the SDE and the ODE: it narrows the distribution.

    Args:
        delta: length of every update in time, > 0, whatever the path's steps; ``None``: theirs.
        inner_steps: updates at each time, with the score anew, >= 1.
        noise_decay: factor of the noise from one time to the next, in (0, 1].
        polish_steps: updates without noise at the last time before the data, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    delta: float | None = None
    inner_steps: int = 1
    noise_decay: float = 1.0
    polish_steps: int = 0

    def __post_init__(self) -> None:
        if self.delta is not None and not 0 < self.delta < float("inf"):
            raise ValueError(f"delta must be > 0, got {self.delta}")
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps must be >= 1, got {self.inner_steps}")
        if not 0 < self.noise_decay <= 1:
            raise ValueError(f"noise_decay must be in (0, 1], got {self.noise_decay}")
        if self.polish_steps < 0:
            raise ValueError(f"polish_steps must be >= 0, got {self.polish_steps}")


@dataclass(frozen=True)
class DLS(Solver):
    """Dale-Langevin sampler: multiplicative updates, positive for every step size (arXiv 2510.02730).

    The last update of all has no noise. One call of the model an update.

    Args:
        annealing: the authors' schedule of noise and steps; ``None``: the sampler of the reverse SDE.
    """

    annealing: Annealing | None = None

    def solve(self, predict: Predict, x: Tensor, path: list[Node], process: Process, noise: Noise) -> Tensor:
        """``y <- y + V score + sqrt(V) z``."""

        def update(y: Tensor, x0: Tensor, z: Tensor | None, move: Move) -> Tensor:
            y = torch.lerp(y, x0, move.share)
            return y if z is None else y.add(z, alpha=move.spread)

        return _walk(update, predict, x, path, _brownian(process), noise, self.annealing or Annealing())


@dataclass(frozen=True)
class UMS(Solver):
    """Sign-agnostic multiplicative sampler: Euler-Maruyama in ``x``, whose factor may fall to 0 or below.

    Values whose factor is not positive are counted; a warning at the end says how many there were. It agrees with
    :class:`DLS` weakly, as steps become small. One call of the model an update.

    Args:
        annealing: the authors' schedule of noise and steps; ``None``: the sampler of the reverse SDE.
        floor: smallest factor of an update, > 0; ``None`` refuses smaller ones instead.

    Raises:
        ValueError: ``floor`` out of range.
        RuntimeError: when sampling with ``floor=None``: a factor was not positive.
    """

    annealing: Annealing | None = None
    floor: float | None = 1e-6

    def __post_init__(self) -> None:
        if self.floor is not None and not 0 < self.floor < 1:
            raise ValueError(f"floor must be in (0, 1) or None, got {self.floor}")

    def solve(self, predict: Predict, x: Tensor, path: list[Node], process: Process, noise: Noise) -> Tensor:
        """``x <- x (1 + 2 V - mu delta + V h + sqrt(V) z)``, as the logarithm of its factor."""
        path_process = _brownian(process)
        _, scale = path_process.drift_and_scale(0.0, x)
        fallen = torch.zeros((), dtype=torch.int64, device=x.device)

        def update(y: Tensor, x0: Tensor, z: Tensor | None, move: Move) -> Tensor:
            own = scale**2 * move.variance  # of the channel
            factor = 1 + own - move.growth + scale * move.share * (x0 - y)
            if z is not None:
                factor = factor + scale * move.spread * z
            fallen.add_((factor <= 0).sum())
            return y + (factor.clamp(min=self.floor or 0.0).log() + move.growth - 0.5 * own) / scale

        result = _walk(update, predict, x, path, path_process, noise, self.annealing or Annealing())
        if count := int(fallen):
            message = f"{count} factors of UMS were not positive in {len(path) - 1} steps"
            if self.floor is None:
                raise RuntimeError(f"{message}: take more steps, DLS, or a floor")
            rank_zero_warn(f"{message}; each became floor={self.floor:g}. Take more steps, or DLS.")
        return result


def _walk(
    update: Update,
    predict: Predict,
    y: Tensor,
    path: list[Node],
    process: GeometricBrownian,
    noise: Noise,
    annealing: Annealing,
) -> Tensor:
    """Updates along the path: ``update(y, predicted clean sample, noise, move)``."""
    _warn_of_heuristics(path, annealing)
    loudness = 1.0
    growths = [float(process.growth(torch.tensor(node.t, dtype=torch.float64))) for node in path]
    for i, (here, there) in enumerate(pairwise(path)):
        longer = 1.0 if annealing.delta is None else annealing.delta / (here.t - there.t)
        variance = longer * (here.point.sigma**2 - there.point.sigma**2)
        spread = loudness * variance**0.5
        move = Move(variance, variance / here.point.sigma**2, longer * (growths[i] - growths[i + 1]), spread)
        last = i == len(path) - 2
        if last and there.point.sigma == 0 and annealing == Annealing(noise_decay=annealing.noise_decay):
            return predict(y, here.t)  # a whole step of the score without noise, exactly
        for k in range(annealing.inner_steps + (annealing.polish_steps if last else 0)):
            noisy = k < annealing.inner_steps - (1 if last else 0)
            y = update(y, predict(y, here.t), noise(y) if noisy else None, move)
        loudness *= annealing.noise_decay
    return y


def _warn_of_heuristics(path: list[Node], annealing: Annealing) -> None:
    total = path[0].t - path[-1].t
    travelled = total * annealing.inner_steps
    if annealing.delta is not None:
        travelled = annealing.delta * annealing.inner_steps * (len(path) - 1)
    if annealing.noise_decay < 1 or abs(travelled - total) > 0.01 * total:
        rank_zero_warn(
            f"{annealing} is a heuristic that narrows the distribution: its updates travel {travelled:.3g} of time in "
            f"{total:.3g}; without annealing the sampler is that of the model."
        )


def _brownian(process: Process) -> GeometricBrownian:
    if not isinstance(process, GeometricBrownian):
        raise ValueError(f"process must be GeometricBrownian for DLS and UMS, got {process}")
    return process
