"""Costs between point sets, and their transport without the matrix of all pairs."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_methods.transport.semi_dual import (
    Point,
    equal_means,
    iterative_direction,
    joint_sum,
    lowest_exponent,
    mv,
    negligible,
    point,
    softmax_rows,
    sparse_schur,
    total_rows,
)
from lit_methods.transport.sinkhorn_newton_sparse import (
    NoSecondDerivative,
    SinkhornNewton,
    checked_weights,
    lowest_of_ranks,
    maximise,
    share_of_rank,
)

__all__ = ["grid_points", "point_cost"]

_TILE = 2**18  # entries
_MOST_ENTRIES = 2**23  # of a Hessian in memory, where they take half a GB
_MOST_SHARE = 1 / 16  # of its entries that are worth keeping


def point_cost(x: Tensor, y: Tensor, p: int = 2) -> Tensor:
    """Euclidean distances to the power ``p`` between point sets.

    Args:
        x: ``(..., n, d)``.
        y: ``(..., m, d)``, with the batch dimensions of ``x``.
        p: 1 or 2.

    Returns:
        ``(..., n, m)``.

    Raises:
        ValueError: ``p`` or a shape out of range.
    """
    _check_points(x, y, p)
    if p == 1:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    center = y.detach().mean(-2, keepdim=True)  # small numbers cancel less
    x, y = x - center, y - center
    return x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT


def _check_points(x: Tensor, y: Tensor, p: int) -> None:
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    if x.ndim < 2 or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x and y must have shapes (..., n, d) and (..., m, d), got {tuple(x.shape)}, {tuple(y.shape)}"
        )


def grid_points(*sizes: int) -> Tensor:
    """Coordinates of the cells of a histogram or of an image's pixels, in units of a cell: ``(cells, dimensions)``.

    The order is that of ``image.flatten()``, so that ``wasserstein_distance(grid, grid, image.flatten() / total, ...)``
    compares images, and ``point_cost(grid, grid)`` is their cost.

    Args:
        *sizes: number of cells along each dimension, >= 1.

    Raises:
        ValueError: a size out of range, or none.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be at least 1 each, got {sizes}")
    axes = [torch.arange(size, dtype=torch.float32) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


class TiledDual(NamedTuple):
    """One problem between point sets whose costs are made anew, some rows at a time, whenever they are needed.

    A Newton step keeps the entries of the plan that are not negligible. If they are too many, it makes the whole plan
    anew for every product of its conjugate gradients.

    Attributes:
        x: ``(1, n, d)``.
        y: ``(1, m, d)``.
        a: weights of ``x``, ``(1, n)``, of sum 1 over all ranks.
        b: weights of ``y``, ``(1, m)``, of sum 1.
        p: the cost is the distance to this power.
        eta: inverse regularization.
        sharded: whether ``x`` and ``a`` are this rank's.
    """

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    p: int
    eta: float
    sharded: bool

    def tiles(self, scale: float, v: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and ``v - scale eta cost`` of these rows, ``(1, rows, m)``."""
        rows, step = self.x.shape[1], max(1, _TILE // self.y.shape[1])
        for start in range(0, rows, step):
            chosen = slice(start, min(start + step, rows))
            tile = point_cost(self.x[:, chosen], self.y, self.p).mul_(-self.eta * scale)
            yield chosen, tile.add_(v[:, None, :])

    def plan(self, scale: float, at: Point) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and the plan's of these rows."""
        for rows, tile in self.tiles(scale, at.v):
            tile.add_(at.u[:, rows, None]).clamp_(min=lowest_exponent(tile.dtype))
            yield rows, tile.exp_()

    def at(self, scale: float, v: Tensor) -> Point:
        """The point of ``v``."""
        u, columns = torch.empty_like(self.a), torch.zeros_like(self.b)
        for rows, tile in self.tiles(scale, v):
            u[:, rows] = softmax_rows(tile, self.a[:, rows])
            columns += tile.sum(-2)
        return point(self.a, self.b, v, u, columns, self.sharded)

    def sweep(self, scale: float, v: Tensor, count: int, tol: float) -> tuple[Tensor, int]:
        """Sweeps in the log domain."""
        for done in range(count):
            at = self.at(scale, v)
            if float(at.error.max()) <= tol:
                return v, done
            v = v + self.b.log() - at.columns.clamp(min=torch.finfo(v.dtype).tiny).log()
        return v, count

    def direction(self, scale: float, at: Point, gradient: Tensor, damping: Tensor) -> Tensor:
        """Newton's direction with a sparse Hessian, or without storing it."""
        n, m = self.x.shape[1], self.y.shape[1]
        threshold = negligible(at.error, n * m, self.sharded)
        most = min(_MOST_ENTRIES, _MOST_SHARE * n * m)
        rows, columns, values, number = [], [], [], 0
        for chosen, tile in self.plan(scale, at):
            entries = (tile >= threshold).flatten().nonzero()[:, 0]
            rows.append(chosen.start + entries // m)
            columns.append(entries % m)
            values.append(tile.flatten().index_select(0, entries))
            number += len(entries)
            if number > most:
                return self._matrix_free_direction(scale, at, gradient, damping)
        times, squares = sparse_schur(torch.cat(rows), torch.cat(columns), torch.cat(values), self.a, self.b)
        return iterative_direction(self.b, at, gradient, damping, times, squares, self.sharded)

    def _matrix_free_direction(self, scale: float, at: Point, gradient: Tensor, damping: Tensor) -> Tensor:
        def times(vector: Tensor) -> Tensor:
            image = torch.zeros_like(vector)
            for rows, tile in self.plan(scale, at):
                image += mv(tile.mT, mv(tile, vector) / self.a[:, rows])
            return image

        no_squares = torch.zeros_like(self.b)
        return iterative_direction(self.b, at, gradient, damping, times, no_squares, self.sharded)

    def subset(self, chosen: Tensor) -> "TiledDual":
        """All, as there is but one."""
        return self

    def replace(self, chosen: Tensor, part: "TiledDual") -> None:
        """Nothing: no plan is held."""


def tiled_value(solver: SinkhornNewton, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, p: int) -> Tensor:
    """``solver.value(point_cost(x, y, p), a, b)``, ``(...)``, without costs or plan in memory.

    Args:
        solver: its settings; ``sparsity`` is always "adaptive".
        x: ``(..., n, d)``, this rank's if the solver's rows are sharded.
        y: ``(..., m, d)``.
        a: weights of ``x``, ``(..., n)``; ``None``: uniform.
        b: weights of ``y``, ``(..., m)``; ``None``: uniform.
        p: 1 or 2.
    """
    _check_points(x, y, p)
    batch, sizes = x.shape[:-2], torch.Size((x.shape[-2], y.shape[-2]))
    a, b = checked_weights(x, batch, sizes, a, b, solver.sharded)
    sets = (z.reshape(-1, *z.shape[-2:]) for z in (x, y))
    values = torch.stack([_TiledValue.apply(*problem, solver, p) for problem in zip(*sets, a, b, strict=True)])
    return (joint_sum(values) if solver.sharded else values).reshape(batch)


class _TiledValue(torch.autograd.Function):
    """The optimal value of one problem; with sharded rows, this rank's part of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, solver: SinkhornNewton, p: int) -> Tensor:
        eta, sharded, mass = solver.eta, solver.sharded, b.sum()
        center = y.mean(0)
        reach = sum(torch.linalg.vector_norm(z - center, dim=1).max() for z in (x, y)) ** p
        extent = -lowest_of_ranks(-reach) if sharded else reach
        dual = TiledDual(x[None], y[None], (a / total_rows(a[None], sharded)[0]), b[None] / mass, p, eta, sharded)
        end, _ = maximise(dual, solver, torch.zeros_like(dual.b), eta * float(extent))
        f, g = (z[0] for z in equal_means((end.u + mass.log() + 1) / eta, end.v / eta, sharded))
        ctx.save_for_backward(x, y, a, b, f, g)
        ctx.solver, ctx.p = solver, p
        return (a * f).sum() - a.sum() / eta + share_of_rank(b * g, sharded).sum()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        x, y, a, b, f, g = ctx.saved_tensors
        eta, sharded = ctx.solver.eta, ctx.solver.sharded
        grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)
        with torch.no_grad():
            dual = TiledDual(x[None], y[None], a[None], b[None], ctx.p, eta, sharded)
            at = point(dual.a, dual.b, eta * g[None], eta * f[None] - 1, dual.b, False)
            for rows, plan in dual.plan(1.0, at):
                with torch.enable_grad():
                    some, others = x[rows].detach().requires_grad_(), y.detach().requires_grad_()
                    cost = point_cost(some, others, ctx.p)
                grad_x[rows], more = torch.autograd.grad(cost, (some, others), plan[0])
                grad_y += more
        results = tuple(weight.detach() * z for z in (grad_x, grad_y, f, share_of_rank(g, sharded)))
        if torch.is_grad_enabled():
            results = tuple(NoSecondDerivative.apply(z, weight, x, y, a, b) for z in results)
        return *results, None, None
