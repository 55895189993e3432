"""Convex sets that online optimizers play in, with exact projections.

A constraint is called as ``constraint(tensors, leading=0, weights=None)`` and returns the projections: ``tensors`` are
the parameters of one group; ``leading`` dimensions of each are a batch of independent points; ``weights`` (shaped like
``tensors``) make it the projection in the norm ``sqrt(sum_i w_i x_i^2)``. No call synchronises with the host.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Ball", "Box", "L1Ball", "Simplex", "project_l1_ball", "project_simplex", "weighted_ball_multiplier"]


class Box:
    """``low <= x <= high``, entry by entry; exact in every separable geometry.

    Args:
        low: lower end, ``-inf`` for none.
        high: upper end, ``inf`` for none.

    Raises:
        ValueError: ``low`` is not below ``high``.
    """

    def __init__(self, low: float = 0.0, high: float = float("inf")) -> None:
        if not low < high:
            raise ValueError(f"low must be below high, got low={low}, high={high}")
        self.low, self.high = low, high

    def __call__(
        self, tensors: Sequence[Tensor], leading: int = 0, weights: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Clamp."""
        return [x.clamp(self.low, self.high) for x in tensors]


class Ball:
    """``||x||_p <= radius`` around the origin.

    In the Euclidean geometry (and in a weighted one) ``norm`` must be 2; the p-norm geometry projects onto its own
    p-norm ball, by scaling.

    Args:
        radius: > 0.
        norm: p, in (1, 2].
        per_tensor: every parameter has a ball of its own; otherwise all parameters of a group together are one point.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, radius: float, norm: float = 2.0, per_tensor: bool = False) -> None:
        if not 0 < radius < float("inf"):
            raise ValueError(f"radius must be > 0 and finite, got {radius}")
        if not 1 < norm <= 2:
            raise ValueError(f"norm must be in (1, 2], got {norm}; for norm 1 use L1Ball")
        self.radius: float | Tensor = radius
        self.norm, self.per_tensor = norm, per_tensor

    def beside(self, fixed: Sequence[Tensor]) -> "Ball":
        """What is left of the ball for the other parameters of a group while ``fixed`` stay: a ball again."""
        if self.per_tensor or not fixed:
            return self
        taken = torch.stack([x.double().abs().pow(self.norm).sum().to(fixed[0].device) for x in fixed]).sum()
        left = copy.copy(self)
        left.radius = (self.radius**self.norm - taken).clamp(min=0) ** (1 / self.norm)
        return left

    def __call__(
        self, tensors: Sequence[Tensor], leading: int = 0, weights: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Scale into the ball; with weights, solve for the multiplier of the constraint."""
        if self.per_tensor and len(tensors) > 1:
            each = [None] * len(tensors) if weights is None else [[w] for w in weights]
            return [self([x], leading, w)[0] for x, w in zip(tensors, each, strict=True)]
        flat = torch.cat([x.reshape(*x.shape[:leading], -1) for x in tensors], -1)
        if weights is None:
            norm = torch.linalg.vector_norm(flat, self.norm, -1, keepdim=True)
            projected = flat * torch.where(norm > self.radius, self.radius / norm, 1.0)
        else:
            w = torch.cat([w.reshape(*w.shape[:leading], -1) for w in weights], -1)
            nu = weighted_ball_multiplier(w, flat, self.radius)[..., None]
            projected = flat * (w / (w + nu))
        parts = projected.split([x[(0,) * leading].numel() for x in tensors], -1)
        return [part.view_as(x).to(x.dtype) for part, x in zip(parts, tensors, strict=True)]


class Simplex:
    """Probability vectors along ``dim``: non-negative entries that sum to ``total``.

    Args:
        dim: dimension along which entries sum, negative (counted from the end, so that batches keep it).
        total: > 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, dim: int = -1, total: float = 1.0) -> None:
        if dim >= 0:
            raise ValueError(f"dim must be negative (counted from the end), got {dim}")
        if not 0 < total < float("inf"):
            raise ValueError(f"total must be > 0 and finite, got {total}")
        self.dim, self.total = dim, total

    def __call__(
        self, tensors: Sequence[Tensor], leading: int = 0, weights: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Euclidean projection of every row."""
        return [project_simplex(x, self.dim, self.total) for x in tensors]


class L1Ball:
    """``sum |x_i| <= radius`` along ``dim``.

    Args:
        radius: > 0.
        dim: dimension along which absolute values sum, negative.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, radius: float = 1.0, dim: int = -1) -> None:
        if not 0 < radius < float("inf"):
            raise ValueError(f"radius must be > 0 and finite, got {radius}")
        if dim >= 0:
            raise ValueError(f"dim must be negative (counted from the end), got {dim}")
        self.radius, self.dim = radius, dim

    def __call__(
        self, tensors: Sequence[Tensor], leading: int = 0, weights: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Euclidean projection of every row."""
        return [project_l1_ball(x, self.radius, self.dim) for x in tensors]


Constraint = Box | Ball | Simplex | L1Ball


def apply_constraint(
    constraint: Constraint | Callable[[Tensor], Tensor] | None,
    tensors: Sequence[Tensor],
    leading: int = 0,
    weights: Sequence[Tensor] | None = None,
    fixed: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Project with a set of this module, or with a user's own projection of one tensor (at most one leading dim).

    ``fixed`` are the other parameters of the group, which stay: a set that all share is cut to what they leave of it.
    """
    if constraint is None:
        return list(tensors)
    if isinstance(constraint, Ball):
        constraint = constraint.beside(fixed)
    if isinstance(constraint, Constraint):
        return constraint(tensors, leading, weights)
    if leading:
        return [torch.stack([constraint(row) for row in x]) for x in tensors]
    return [constraint(x) for x in tensors]


def project_simplex(x: Tensor, dim: int = -1, total: float = 1.0) -> Tensor:
    """Euclidean projection onto ``{u >= 0, sum u = total}`` along ``dim``, by sorting (O(d log d) a row).

    Held, Wolfe, Crowder (1974); Duchi et al. (2008), figure 1.
    """
    ordered = x.sort(dim, descending=True).values
    shape = [1] * x.ndim
    shape[dim] = -1
    counts = torch.arange(1, x.shape[dim] + 1, device=x.device, dtype=x.dtype).view(shape)
    thresholds = (ordered.cumsum(dim) - total) / counts
    last = (ordered > thresholds).sum(dim, keepdim=True).clamp(min=1) - 1
    return (x - thresholds.gather(dim, last)).clamp(min=0)


def project_l1_ball(x: Tensor, radius: float = 1.0, dim: int = -1) -> Tensor:
    """Euclidean projection onto ``{sum |u| <= radius}`` along ``dim``: Duchi et al. (2008), section 4."""
    inside = x.abs().sum(dim, keepdim=True) <= radius
    return torch.where(inside, x, x.sign() * project_simplex(x.abs(), dim, radius))


def weighted_ball_multiplier(weights: Tensor, y: Tensor, radius: float | Tensor, iterations: int = 50) -> Tensor:
    """Return the ``nu >= 0`` for which ``x = w y / (w + nu)`` is the projection of ``y`` onto ``||x||_2 <= radius``.

    The norm of the projection is ``sqrt(sum_i w_i x_i^2)``; with the eigenvalues of a matrix ``H`` as weights and
    ``y`` in its eigenbasis it is the projection in the norm of ``H``. Newton on ``1 / ||x(nu)||``, which from ``nu =
    0`` rises to the root without overshooting (the secular equation of trust-region methods).

    Args:
        weights: > 0, ``(..., d)``.
        y: ``(..., d)``.
        radius: >= 0; a tensor has no dimensions.
        iterations: Newton steps; the default is far more than the quadratic convergence needs.

    Returns:
        ``(...)``; 0 where ``y`` is inside.
    """
    nu = torch.zeros_like(y[..., :1])
    moved = weights * y
    for _ in range(iterations):
        x = moved / (weights + nu)
        square = x.square().sum(-1, keepdim=True)
        slope = (x.square() / (weights + nu)).sum(-1, keepdim=True)
        step = torch.where(slope > 0, square / slope * (square.sqrt() / radius - 1), 0.0)
        nu = (nu + step).clamp(min=0)
    return nu[..., 0]
