"""Mirror maps: the geometries of online mirror descent.

A map holds a point ``x`` as its mirror coordinates ``y = grad psi(x)``, in which a step of ``argmin <g, x> + B(x, x')``
is ``y = y' - g``. What it can be constrained to exactly is in ``exact``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lit_methods.optim.constraints import Ball, Box, Constraint, L1Ball, Simplex

__all__ = ["DiagonalAdaGrad", "Entropy", "Euclidean", "Hypentropy", "PNorm", "UnnormalizedEntropy"]

SMALLEST_PROBABILITY = 1e-30


class MirrorMap(ABC):
    """A geometry; abstract.

    Attributes:
        exact: the sets onto which the map has an exact projection.
        positive: whether points must be positive.
    """

    exact: tuple[type, ...]
    positive = False

    @abstractmethod
    def coordinates(self, x: Tensor) -> Tensor:
        """Mirror coordinates of a point."""

    @abstractmethod
    def point(self, y: Tensor) -> Tensor:
        """The point with coordinates ``y``."""

    @abstractmethod
    def dual_square(self, g: Tensor) -> Tensor:
        """Square of the dual norm in which gradient variation is measured."""

    def move(self, y: Tensor, g: Tensor) -> Tensor:
        """Coordinates after a step along ``-g``."""
        return y - g


class Euclidean(MirrorMap):
    """``psi = ||x||^2 / 2``: gradient steps. Exact with every set and with your own projections."""

    exact = (Box, Ball, Simplex, L1Ball)

    def coordinates(self, x: Tensor) -> Tensor:
        """The point itself."""
        return x.clone()

    def point(self, y: Tensor) -> Tensor:
        """The point itself."""
        return y

    def dual_square(self, g: Tensor) -> Tensor:
        """Square of the Euclidean norm."""
        return g.square().sum()


class Entropy(MirrorMap):
    """``psi = sum x log x`` on rows along ``dim`` that sum to 1: multiplicative weights (OMWU, with optimism).

    Coordinates are log-probabilities, so no probability underflows; zeros of the starting point become 1e-30. The dual
    norm is the largest entry of a row, and the Euclidean norm over rows.

    Args:
        dim: the dimension of the probabilities, negative.

    Raises:
        ValueError: ``dim`` is not negative.
    """

    exact = (Simplex,)
    positive = True

    def __init__(self, dim: int = -1) -> None:
        if dim >= 0:
            raise ValueError(f"dim must be negative (counted from the end), got {dim}")
        self.dim = dim

    def coordinates(self, x: Tensor) -> Tensor:
        """Log-probabilities."""
        return x.clamp(min=SMALLEST_PROBABILITY).log().log_softmax(self.dim)

    def move(self, y: Tensor, g: Tensor) -> Tensor:
        """``log_softmax(y - g)``; adding a constant to ``g`` changes nothing."""
        return (y - g).log_softmax(self.dim)

    def point(self, y: Tensor) -> Tensor:
        """Probabilities."""
        return y.exp()

    def dual_square(self, g: Tensor) -> Tensor:
        """Sum over rows of the squared largest entry."""
        return g.abs().amax(self.dim).square().sum()


class UnnormalizedEntropy(MirrorMap):
    """``psi = sum x log x - x`` on positive ``x``: exponentiated gradient without normalisation."""

    exact = (Box,)
    positive = True

    def coordinates(self, x: Tensor) -> Tensor:
        """Logarithms; zeros become 1e-30."""
        return x.clamp(min=SMALLEST_PROBABILITY).log()

    def point(self, y: Tensor) -> Tensor:
        """Exponentials."""
        return y.exp()

    def dual_square(self, g: Tensor) -> Tensor:
        """Square of the largest entry."""
        return g.abs().amax().square()


class PNorm(MirrorMap):
    """``psi = ||x||_p^2 / 2`` over each whole tensor, ``p - 1`` strongly convex in the p-norm.

    Args:
        p: in (1, 2]; 2 is the Euclidean geometry.

    Raises:
        ValueError: ``p`` out of range.
    """

    exact = (Ball,)

    def __init__(self, p: float = 1.5) -> None:
        if not 1 < p <= 2:
            raise ValueError(f"p must be in (1, 2], got {p}")
        self.p = p
        self.q = p / (p - 1)

    def coordinates(self, x: Tensor) -> Tensor:
        """``sign(x) |x|^(p-1) / ||x||_p^(p-2)``, 0 at 0."""
        return _norm_gradient(x, self.p)

    def point(self, y: Tensor) -> Tensor:
        """The same with ``q = p / (p - 1)``."""
        return _norm_gradient(y, self.q)

    def dual_square(self, g: Tensor) -> Tensor:
        """Square of the q-norm."""
        return torch.linalg.vector_norm(g, self.q).square()


class Hypentropy(MirrorMap):
    """``psi = sum x asinh(x / b) - sqrt(x^2 + b^2)``: between Euclidean (large b) and signed multiplicative (small b).

    Ghai, Hazan, Singer, "Exponentiated Gradient Meets Gradient Descent", ALT 2020.

    Args:
        b: > 0.

    Raises:
        ValueError: ``b`` out of range.
    """

    exact = (Box,)

    def __init__(self, b: float = 1.0) -> None:
        if not 0 < b < float("inf"):
            raise ValueError(f"b must be > 0 and finite, got {b}")
        self.b = b

    def coordinates(self, x: Tensor) -> Tensor:
        """``asinh(x / b)``."""
        return (x / self.b).asinh()

    def point(self, y: Tensor) -> Tensor:
        """``b sinh(y)``."""
        return y.sinh() * self.b

    def dual_square(self, g: Tensor) -> Tensor:
        """Square of the Euclidean norm."""
        return g.square().sum()


class DiagonalAdaGrad(MirrorMap):
    """``psi_t = sum_i h_i x_i^2 / 2`` with ``h = epsilon + sqrt(sum of (g - M)^2)`` per entry.

    The optimizer keeps the sums. They exclude the present gradient, as the analysis wants, except that an entry whose
    sum is still zero takes its present gradient, so that the first step is of size ``lr`` (practical, not in the
    paper).

    Args:
        epsilon: >= 0.

    Raises:
        ValueError: ``epsilon`` out of range.
    """

    exact = (Box, Ball)

    def __init__(self, epsilon: float = 1e-10) -> None:
        if not 0 <= epsilon < float("inf"):
            raise ValueError(f"epsilon must be >= 0 and finite, got {epsilon}")
        self.epsilon = epsilon

    def coordinates(self, x: Tensor) -> Tensor:
        """The point itself."""
        return x.clone()

    def point(self, y: Tensor) -> Tensor:
        """The point itself."""
        return y

    def dual_square(self, g: Tensor) -> Tensor:
        """Square of the Euclidean norm."""
        return g.square().sum()

    def metric(self, squares: Tensor, gradient: Tensor) -> Tensor:
        """``h`` from the sums of squares and the present gradient; 1 where it would be 0."""
        metric = torch.where(squares > 0, squares.sqrt(), gradient.abs()) + self.epsilon
        return torch.where(metric > 0, metric, 1.0)


MirrorName = Literal["euclidean", "entropy", "unnormalized_entropy", "p_norm", "hypentropy", "adagrad"]

_BY_NAME: dict[str, Callable[[], MirrorMap]] = {
    "euclidean": Euclidean,
    "entropy": Entropy,
    "unnormalized_entropy": UnnormalizedEntropy,
    "p_norm": PNorm,
    "hypentropy": Hypentropy,
    "adagrad": DiagonalAdaGrad,
}


def mirror_map(mirror: MirrorName | MirrorMap) -> MirrorMap:
    """Return the map, or that of the name with its default arguments.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(mirror, str):
        return mirror
    if mirror not in _BY_NAME:
        raise ValueError(f"mirror must be a mirror map or one of {', '.join(_BY_NAME)}, got {mirror!r}")
    return _BY_NAME[mirror]()


def check_exact(mirror: MirrorMap, constraint: Constraint) -> None:
    """Refuse a set onto which the map has no exact projection."""
    name, allowed = type(mirror).__name__, mirror.exact
    if not isinstance(constraint, allowed):
        names = " or ".join(kind.__name__ for kind in allowed)
        raise ValueError(f"constraint must be {names} with the mirror map {name}, got {type(constraint).__name__}")
    norm = mirror.p if isinstance(mirror, PNorm) else 2.0
    if isinstance(constraint, Ball) and constraint.norm != norm:
        raise ValueError(f"constraint must be a Ball with norm={norm} for the mirror map {name}, got {constraint.norm}")
    if isinstance(constraint, Ball) and isinstance(mirror, PNorm) and not constraint.per_tensor:
        raise ValueError("constraint must be a Ball with per_tensor=True for the mirror map PNorm, got False")
    if isinstance(mirror, Entropy) and (constraint.dim, constraint.total) != (mirror.dim, 1.0):  # type: ignore[union-attr]
        raise ValueError(f"constraint must be Simplex(dim={mirror.dim}) for Entropy(dim={mirror.dim}), got another")


def _norm_gradient(x: Tensor, p: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, p)
    unit = x / torch.where(norm > 0, norm, 1.0)
    return norm * unit.sign() * unit.abs() ** (p - 1)
