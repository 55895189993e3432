"""Settings of particle optimizers that go together."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lit_methods.optim.foundation.groups import check_at_least, check_choice, check_nonnegative, check_positive

__all__ = ["EffectiveSampleSize", "Growing", "InitialCloud", "ParticleBatches"]

Init = TypeVar("Init", bound=Callable[..., None])


@dataclass(frozen=True)
class InitialCloud:
    """Normal particles at the start.

    Args:
        std: their standard deviation in every coordinate, > 0.
        around_current: whether they lie around the parameters, or around 0.

    Raises:
        ValueError: ``std`` is not > 0 and finite.
    """

    std: float = 1.0
    around_current: bool = False

    def __post_init__(self) -> None:
        check_positive(std=self.std)


@dataclass(frozen=True)
class ParticleBatches:
    """Particles that make a consensus point together.

    Args:
        size: how many, >= 1, or None for all. Lowered to a divisor of the number of particles.
        update: which particles a batch's consensus point moves: all ("full"), or the batch's own ("partial").

    Raises:
        ValueError: an argument out of range.
    """

    size: int | None = 10
    update: Literal["full", "partial"] = "full"

    def __post_init__(self) -> None:
        check_at_least(1, size=self.size)
        check_choice("update", self.update, ("full", "partial"))


@dataclass(frozen=True)
class Growing:
    """An inverse temperature that is multiplied after every step; 1.05 is CBXpy's schedule.

    To cool once in a while, and sigma too, see :class:`~lit_methods.callbacks.CBOCooling`.

    Args:
        alpha: at first, >= 0.
        factor: > 0.

    Raises:
        ValueError: an argument out of range.
    """

    alpha: float = 50.0
    factor: float = 1.05

    def __post_init__(self) -> None:
        check_positive(factor=self.factor)
        check_nonnegative(alpha=self.alpha)


@dataclass(frozen=True)
class EffectiveSampleSize:
    """For every consensus point, the inverse temperature whose weights count as a share of the particles.

    An extension known from CBXpy.

    Args:
        share: of the particles, in (0, 1).

    Raises:
        ValueError: ``share`` out of range.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must be in (0, 1), got {self.share}")


def divisor(number: int, wanted: int) -> int:
    """The largest divisor of ``number`` up to ``wanted``; a warning when that is less than both."""
    divisor = next(k for k in range(min(wanted, number), 0, -1) if number % k == 0)
    if divisor < min(wanted, number):
        warnings.warn(f"particle_batch_size={wanted} does not divide num_particles={number}; using {divisor}")
    return divisor


Alpha = float | Growing | EffectiveSampleSize


def temperature(alpha: Alpha, default: float) -> dict[str, Any]:
    """What ``alpha`` means for a parameter group."""
    if isinstance(alpha, EffectiveSampleSize):
        return {"alpha": default, "effective_sample_size": alpha.share, "alpha_growth": 1.0}
    if isinstance(alpha, Growing):
        return {"alpha": alpha.alpha, "effective_sample_size": None, "alpha_growth": alpha.factor}
    return {"alpha": alpha, "effective_sample_size": None, "alpha_growth": 1.0}


def former_settings(init: Init) -> Init:
    """Let ``init`` take the keyword arguments of version 0.0 too, for one release; they warn."""

    @functools.wraps(init)
    def taking_former(self: Any, *args: Any, **kwargs: Any) -> None:
        old = {name: kwargs.pop(name) for name in MOVED if name in kwargs}
        if old:
            new = _translated(old, kwargs.get("alpha", 50.0))
            text = ", ".join(f"{name}={value!r}" for name, value in new.items())
            warnings.warn(f"{type(self).__name__}'s {', '.join(old)} will go: write {text}", FutureWarning)
            kwargs |= new
        init(self, *args, **kwargs)

    return taking_former  # type: ignore[return-value]


MOVED = {
    "particle_batch_size": "batches.size",
    "update": "batches.update",
    "init_std": "init.std",
    "init_around_current": "init.around_current",
    "effective_sample_size": "share of alpha (EffectiveSampleSize)",
    "alpha_growth": "factor of alpha (Growing)",
}


def _translated(old: dict[str, Any], alpha: float) -> dict[str, Any]:
    new: dict[str, Any] = {}
    if {"init_std", "init_around_current"} & old.keys():
        new["init"] = InitialCloud(old.get("init_std", 1.0), old.get("init_around_current", False))
    if {"particle_batch_size", "update"} & old.keys():
        new["batches"] = ParticleBatches(old.get("particle_batch_size", 10), old.get("update", "full"))
    if old.get("effective_sample_size") is not None:
        new["alpha"] = EffectiveSampleSize(old["effective_sample_size"])
    elif old.get("alpha_growth", 1.0) != 1.0:
        new["alpha"] = Growing(alpha, old["alpha_growth"])
    return new
