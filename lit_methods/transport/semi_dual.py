"""The dual of entropic transport, its row potential at the best, and Newton directions in the column potential.

With potentials ``u`` (rows) and ``v`` (columns) in units of ``1 / eta``, the plan is ``exp(u + v - scale eta cost)``;
``scale`` is below 1 on the way to the full ``eta``. Given ``v``, the best ``u`` makes each row of the plan a softmax
times its weight.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from lit_methods.optim.foundation.ranks import world_size

Sparsity = Literal["adaptive", "topk", "dense"]
_DENSE_WORK = 2**24  # up to this many products, B m^3, dense factorisations are as fast as conjugate gradients
_CG_STEPS = 400


class Point(NamedTuple):
    """Where an ascent is.

    Attributes:
        v: column potential, ``(B, m)``.
        u: the best row potential for it, ``(B, n)``.
        columns: column sums of their plan, whose row sums are exact, ``(B, m)``.
        objective: the dual's value, ``(B,)``.
        error: ``sum |columns - b|``, ``(B,)``.
    """

    v: Tensor
    u: Tensor
    columns: Tensor
    objective: Tensor
    error: Tensor

    def replaced(self, chosen: Tensor, part: "Point") -> "Point":
        """With the problems ``chosen`` (B,) taken from ``part``."""
        return Point(*(whole.index_put((chosen,), x) for whole, x in zip(self, part, strict=True)))


class SemiDual(Protocol):
    """A batch of problems: what the solver needs to know of them."""

    @property
    def b(self) -> Tensor:
        """Weights of the columns, ``(B, m)``, of sum 1."""

    def at(self, scale: float, v: Tensor) -> Point:
        """The point of column potentials ``v``, ``(B, m)``."""

    def sweep(self, scale: float, v: Tensor, count: int, tol: float) -> tuple[Tensor, int]:
        """At most ``count`` Sinkhorn sweeps, until all column sums err by at most ``tol``; ``v`` and sweeps done."""

    def direction(self, scale: float, at: Point, gradient: Tensor, damping: Tensor) -> Tensor:
        """Newton's direction ``(B, m)`` at the last point."""

    def subset(self, chosen: Tensor) -> Self:
        """Some of the problems, ``chosen`` (B,) boolean."""

    def replace(self, chosen: Tensor, part: Self) -> None:
        """Take over what a subset holds of its last point."""


class DenseDual(NamedTuple):
    """Problems whose plan is held in memory.

    Attributes:
        cost: ``(B, n, m)``, contiguous.
        eta: inverse regularization.
        a: weights of the rows, ``(B, n)``, of sum 1 over all ranks.
        b: weights of the columns, ``(B, m)``, of sum 1.
        plan: ``(B, n, m)``, overwritten by that of the last point.
        sparsity: how to thin out the Hessian.
        nnz_per_row: for ``sparsity="topk"``.
        sharded: whether ``cost``, ``a`` and ``plan`` are this rank's rows.
    """

    cost: Tensor
    eta: float
    a: Tensor
    b: Tensor
    plan: Tensor
    sparsity: Sparsity
    nnz_per_row: int
    sharded: bool

    def at(self, scale: float, v: Tensor) -> Point:
        """The point of ``v``; writes its plan."""
        plan = torch.add(v[:, None, :], self.cost, alpha=-self.eta * scale, out=self.plan)
        u = softmax_rows(plan, self.a)
        return point(self.a, self.b, v, u, plan.sum(-2), self.sharded)

    def sweep(self, scale: float, v: Tensor, count: int, tol: float) -> tuple[Tensor, int]:
        """Scale a fixed plan while scalings are moderate; otherwise make the plan anew in the log domain."""
        a, b, plan = self.a, self.b, self.plan
        tiny = torch.finfo(v.dtype).tiny ** 0.6
        limit = 30.0 if v.dtype == torch.float64 else 10.0
        done = 0
        while done < count:
            u = self.at(scale, v).u
            left, right = torch.ones_like(a), torch.ones_like(b)
            for _ in range(min(count - done, 100)):
                columns = sum_ranks(mv(plan.mT, left), self.sharded)
                if float((right * columns - b).abs().sum(-1).max()) <= tol:
                    return v + right.log(), done
                done += 1
                if bool((columns < tiny).any()):  # a whole column underflows: only possible before the first scaling
                    v = b.log() - self._column_logsumexp(scale, u)
                    right = torch.ones_like(b)
                    break
                right = b / columns
                if float(right.log().abs().max()) > limit:
                    break
                left = a / mv(plan, right)
            v = v + right.log()
        return v, done

    def direction(self, scale: float, at: Point, gradient: Tensor, damping: Tensor) -> Tensor:
        """Newton's direction with a Hessian that is as sparse as asked."""
        plan, (n, m) = self.plan, self.plan.shape[-2:]
        if self.sparsity == "adaptive" and len(plan) * m**3 > _DENSE_WORK:
            threshold = negligible(at.error, n * m, self.sharded)
        elif self.sparsity == "topk" and self.nnz_per_row * max(n, m) < n * m:
            threshold = plan.flatten(1).topk(self.nnz_per_row * max(n, m), sorted=False).values.amin(-1)
        else:
            factor = factorise(schur(plan, self.a, self.sharded), at.columns, damping * self.b)
            return torch.cholesky_solve(gradient[..., None], factor)[..., 0]
        kept = plan >= threshold[:, None, None]
        if self.sparsity == "adaptive" and 4 * int(kept.count_nonzero()) > kept.numel():
            squares = (plan.square() / self.a[..., None]).sum(-2)
            return iterative_direction(self.b, at, gradient, damping, self._schur_times, squares, self.sharded)
        entries = kept.view(-1).nonzero()[:, 0]
        rows, columns = entries // m, entries // (n * m) * m + entries % m
        times, squares = sparse_schur(rows, columns, plan.view(-1).index_select(0, entries), self.a, self.b)
        return iterative_direction(self.b, at, gradient, damping, times, squares, self.sharded)

    def _schur_times(self, vector: Tensor) -> Tensor:
        return mv(self.plan.mT, mv(self.plan, vector) / self.a)

    def subset(self, chosen: Tensor) -> "DenseDual":
        """Some of the problems."""
        cost = self.cost[chosen]
        return self._replace(cost=cost, a=self.a[chosen], b=self.b[chosen], plan=torch.empty_like(cost))

    def replace(self, chosen: Tensor, part: "DenseDual") -> None:
        """Take over a subset's plans."""
        self.plan[chosen] = part.plan

    def _column_logsumexp(self, scale: float, u: Tensor) -> Tensor:
        exponents = u[..., None] - self.eta * scale * self.cost
        top = exponents.amax(-2)
        if self.sharded:
            dist.all_reduce(top, dist.ReduceOp.MAX)
        return top + sum_ranks((exponents - top[:, None]).exp().sum(-2), self.sharded).log()


def softmax_rows(logits: Tensor, a: Tensor) -> Tensor:
    """Make ``logits`` (B, n, m) in place a plan with row sums ``a`` (B, n); the row potential that it takes."""
    top = logits.amax(-1, keepdim=True)
    total = logits.sub_(top).clamp_(min=lowest_exponent(logits.dtype)).exp_().sum(-1, keepdim=True)
    logits.mul_(a[..., None] / total)
    return a.log() - (top + total.log())[..., 0]


def point(a: Tensor, b: Tensor, v: Tensor, u: Tensor, columns: Tensor, sharded: bool) -> Point:
    """A point from its potentials and the column sums of this rank's rows."""
    columns = sum_ranks(columns, sharded)
    objective = sum_ranks((a * u).sum(-1), sharded) + (b * v).sum(-1)
    return Point(v, u, columns, objective, (b - columns).abs().sum(-1))


def sum_ranks(x: Tensor, sharded: bool) -> Tensor:
    """Sum over the ranks, in place; bit for bit the same on all of them."""
    if sharded:
        dist.all_reduce(x)
    return x


def joint_sum(x: Tensor) -> Tensor:
    """Sum over the ranks; the gradient is that of the sum of all ranks' results."""
    return _JointSum.apply(x)


class _JointSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_ranks(x.clone(memory_format=torch.contiguous_format), True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return joint_sum(grads[0])


def lowest_exponent(dtype: torch.dtype) -> float:
    """``exp`` of less is nothing; it is also several times as slow, because it underflows."""
    return 0.85 * math.log(torch.finfo(dtype).tiny)


def negligible(error: Tensor, entries: int, sharded: bool) -> Tensor:
    """Dropping entries of plans below this, ``(B,)``, drops at most a tenth of the marginal error.

    ``entries`` of a plan are this rank's.
    """
    return 0.1 * error.clamp(max=0.1) / (entries * world_size() if sharded else entries)


def sparse_schur(
    rows: Tensor, columns: Tensor, values: Tensor, a: Tensor, b: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The operator ``P^T diag(1/a) P`` on ``(B, m)``, and its diagonal, from entries of the plan sorted by row.

    Rows and columns count through all problems, which lie along the diagonal of one sparse matrix.
    """
    values = values * a.rsqrt().flatten().index_select(0, rows)
    matrix = _csr(rows, columns, values, height=a.numel(), width=b.numel())
    order = columns.argsort(stable=True)
    by_column = (x.index_select(0, order) for x in (columns, rows, values))
    transposed = _csr(*by_column, height=b.numel(), width=a.numel())
    squares = b.new_zeros(b.numel()).index_add_(0, columns, values.square())
    return lambda x: (transposed @ (matrix @ x.flatten())).view_as(x), squares.view_as(b)


def iterative_direction(
    b: Tensor,
    at: Point,
    gradient: Tensor,
    damping: Tensor,
    times: Callable[[Tensor], Tensor],
    squares: Tensor,
    sharded: bool,
) -> Tensor:
    """Newton's direction by conjugate gradients; ``times`` is ``P^T diag(1/a) P``, ``squares`` its diagonal."""
    eps = torch.finfo(b.dtype).eps
    diagonal = at.columns + (damping + 8 * eps) * b
    jacobi = 1 / (diagonal - sum_ranks(squares, sharded)).clamp(min=eps * diagonal)
    tolerance = at.error.sqrt().clamp(max=0.1)[:, None]
    return _conjugate_gradients(lambda x: diagonal * x - sum_ranks(times(x), sharded), gradient, jacobi, tolerance)


def hessian_solve(plan: Tensor, x: Tensor, y: Tensor, sharded: bool = False) -> tuple[Tensor, Tensor]:
    """Solve ``[[diag(P 1), P], [P^T, diag(P^T 1)]] (u, w) = (x, y)`` for ``sum x = sum y``."""
    if plan.shape[-1] > plan.shape[-2] and not sharded:
        w, u = hessian_solve(plan.mT, y, x)
        return u, w
    least = torch.finfo(plan.dtype).tiny ** 0.5  # a tiny weight may be within the tolerance of none
    rows, columns = plan.sum(-1).clamp(min=least), sum_ranks(plan.sum(-2), sharded).clamp(min=least)
    factor = factorise(schur(plan, rows, sharded), columns, torch.zeros_like(columns))
    u, w = torch.zeros_like(x), torch.zeros_like(y)
    for _ in range(3):  # twice refined
        residual_x = x - rows * u - mv(plan, w)
        residual_y = y - columns * w - sum_ranks(mv(plan.mT, u), sharded)
        right = residual_y - sum_ranks(mv(plan.mT, residual_x / rows), sharded)
        right = right - columns * (right.sum(-1, keepdim=True) / columns.sum(-1, keepdim=True))
        step = torch.cholesky_solve(right[..., None], factor)[..., 0]
        w = w + step
        u = u + (residual_x - mv(plan, step)) / rows
    return equal_means(u, w, sharded)


def equal_means(u: Tensor, w: Tensor, sharded: bool) -> tuple[Tensor, Tensor]:
    """Potentials of rows and columns whose sums are the same and whose means are equal."""
    total, number = total_rows(u, sharded)
    shift = (w.mean(-1, keepdim=True) - total / number) / 2
    return u + shift, w - shift


def total_rows(x: Tensor, sharded: bool) -> tuple[Tensor, Tensor]:
    """Sum ``(B, 1)`` of ``x`` (B, n) over the rows of all ranks, and their number."""
    total, number = sum_ranks(torch.stack([x.sum(-1, keepdim=True), torch.full_like(x[:, :1], x.shape[-1])]), sharded)
    return total, number


def mv(matrix: Tensor, vector: Tensor) -> Tensor:
    """Batched products of matrix and vector."""
    if len(matrix) == 1:  # several times as fast as the batched product
        return (matrix[0] @ vector[0])[None]
    return (matrix @ vector[..., None])[..., 0]


def schur(plan: Tensor, rows: Tensor, sharded: bool = False) -> Tensor:
    """``diag(P^T 1) - P^T diag(1/rows) P``, a graph's Laplacian, to the relative precision of each entry."""
    weights = sum_ranks(plan.mT @ (plan / rows[..., None]), sharded)
    weights.diagonal(dim1=-2, dim2=-1).zero_()
    degrees = weights.sum(-1)
    weights.neg_().diagonal(dim1=-2, dim2=-1).copy_(degrees)
    return weights


def factorise(schur: Tensor, columns: Tensor, damping: Tensor) -> Tensor:
    """Cholesky factor of ``schur + diag(damping)``, whose null vector 1 is lifted; overwrites ``schur``."""
    schur.baddbmm_(columns[..., None], columns[..., None, :])
    floor = 8 * torch.finfo(schur.dtype).eps
    schur.diagonal(dim1=-2, dim2=-1).add_(damping + floor * columns)
    factor, failed = torch.linalg.cholesky_ex(schur)
    while floor < 1 and bool(failed.any()):
        floor *= 100
        schur.diagonal(dim1=-2, dim2=-1).add_(floor * columns)
        factor, failed = torch.linalg.cholesky_ex(schur)
    return factor


def _csr(rows: Tensor, columns: Tensor, values: Tensor, *, height: int, width: int) -> Tensor:
    """A CSR matrix of entries sorted by row."""
    starts = torch.zeros(height + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=height).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, (height, width), check_invariants=False)


def _conjugate_gradients(
    matvec: Callable[[Tensor], Tensor], right: Tensor, jacobi: Tensor, tolerance: Tensor
) -> Tensor:
    """Batched preconditioned conjugate gradients from 0, each problem to its relative residual ``tolerance``."""
    x, residual = torch.zeros_like(right), right
    z = jacobi * residual
    direction, rho = z, (residual * z).sum(-1, keepdim=True)
    target = (tolerance.square() * rho).clamp(min=torch.finfo(right.dtype).tiny)
    for step in range(_CG_STEPS):
        if step % 8 == 0 and not bool((rho > target).any()):
            break
        image = matvec(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        alpha = torch.where((rho > target) & (curvature > 0), rho / curvature, 0.0)
        x = x + alpha * direction
        residual = residual - alpha * image
        z = jacobi * residual
        previous, rho = rho, torch.where(alpha > 0, (residual * z).sum(-1, keepdim=True), rho)
        direction = z + torch.where(alpha > 0, rho / previous, 0.0) * direction
    return x
