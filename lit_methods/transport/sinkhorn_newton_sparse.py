"""Entropic optimal transport by Sinkhorn sweeps, then sparse Newton steps (Tang et al., ICLR 2024).

``P = argmin <C, P> + 1/eta sum P log P`` over plans with row sums ``a`` and column sums ``b``. Sinkhorn's sweeps slow
down without bound as ``eta`` grows; Newton's method on the dual converges in about ten steps there, because most of the
plan, which is the Hessian, is negligible and the system sparse (arXiv 2401.12253, Algorithm 1). What differs here, by
measurement:

- After every Newton step the row potential takes its exact maximum, which costs nothing extra: the plan must be
  computed anyway, and becomes a row softmax that cannot overflow. This is Newton on the semi-dual, with the Schur
  complement as its Hessian: 7 steps on images with squared distances, where the paper's two duals at once take 33.
- The Schur complement is the Laplacian of a graph, and its diagonal is summed from the other entries: no cancellation
  when the plan is almost a permutation.
- The Hessian is damped in proportion to the marginal error, and where a full step fails, ``eta`` is approached by
  doublings with a few steps each. Without both, L1 costs, whose optimal plans are many, do not converge in 100 steps.
- The threshold that makes the Hessian sparse follows from the mass that may be dropped; nothing is sorted.

Gradients are implicit: that of the value is the plan and the potentials (envelope theorem), that of plan and potentials
one linear solve with the full Hessian. Neither depends on how many steps the solver took.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_methods.optim.foundation.ranks import world_size
from lit_methods.transport.semi_dual import (
    DenseDual,
    Point,
    SemiDual,
    Sparsity,
    equal_means,
    hessian_solve,
    joint_sum,
    lowest_exponent,
    sum_ranks,
    total_rows,
)

__all__ = ["OTResult", "SinkhornNewton", "sinkhorn_newton"]

_SCALED_RANGE = 40.0  # eta is doubled from where eta * (largest - smallest cost) is at most this
_STAGE_TOL = 3e-3


class OTResult(NamedTuple):
    """A solution, differentiable in ``cost``, ``a`` and ``b``; batch dimensions come first.

    Attributes:
        plan: ``P``, ``(..., n, m)``; rows sum to ``a`` to rounding, columns to ``b`` within ``marginal_error``. If
            ``m > n`` and rows are not sharded, it is the columns that are exact.
        f: potential of the rows, ``(..., n)``: ``P = exp(eta (f + g - cost) - 1)``. Only sums ``f + g`` are determined;
            both are given equal means.
        g: potential of the columns, ``(..., m)``.
        value: ``<cost, P> + 1/eta sum P log P``, ``(...)``: what is minimised.
        cost: ``<cost, P>``, ``(...)``: what is transported.
        n_sinkhorn: Sinkhorn sweeps taken, ``(...)``, int64.
        n_newton: Newton steps taken, ``(...)``, int64.
        marginal_error: ``sum |P^T 1 - b|``, or ``sum |P 1 - a|`` if columns are exact, over the mass, ``(...)``.
        converged: whether it is at most the tolerance, ``(...)``.
    """

    plan: Tensor
    f: Tensor
    g: Tensor
    value: Tensor
    cost: Tensor
    n_sinkhorn: Tensor
    n_newton: Tensor
    marginal_error: Tensor
    converged: Tensor


def sinkhorn_newton(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eta: float | None = None,
    reg: float | None = None,
    warmup: int = 20,
    max_newton: int = 100,
    tol: float | None = None,
    sparsity: Sparsity = "adaptive",
    nnz_per_row: int = 8,
    eps_scaling: int | None = None,
    dtype: torch.dtype | None = None,
    row_sharded: bool = False,
    warmstart: Tensor | None = None,
) -> OTResult:
    """Solve a batch of entropic optimal transport problems, differentiably.

    On CUDA the host waits for the device in every sweep and every step (it reads which problems are done).

    Args:
        cost: ``(..., n, m)``, floating point; ``inf`` forbids a pair, and each row and column needs a finite entry.
        a: weights of the rows, ``(..., n)`` >= 0, broadcast over the batch; ``None``: ``1/n`` each. A weight of 0
            counts as a rounding error of the mass, so that problems with different empty rows make one batch.
        b: weights of the columns, ``(..., m)`` >= 0, with the sum of ``a``; ``None``: uniform.
        eta: inverse regularization > 0, in units of 1 / cost. Errors of the cost are below ``log(n m) / eta``.
        reg: regularization ``1/eta``; give exactly one of the two.
        warmup: Sinkhorn sweeps before the first Newton step, >= 0; fewer when the error is small enough.
        max_newton: Newton steps at the full ``eta``, >= 0; 0 is Sinkhorn's algorithm.
        tol: bound on the marginal error, a share of the mass, > 0; ``None``: 1e-10 in float64 and 1e-5 in float32, or
            a sixteenth of a rounding error of ``eta`` times the range of the costs, if that is more, but at most 0.01.
        sparsity: ``"adaptive"`` drops entries of the Hessian whose sum is at most a tenth of the marginal error, and
            factorises densely where that is faster; ``"topk"`` keeps the ``nnz_per_row * max(n, m)`` largest of each
            problem, the paper's rule; ``"dense"`` drops nothing.
        nnz_per_row: for ``"topk"``, >= 1. The paper's 2/n of the Hessian are 3 here; below 5, steps multiply.
        eps_scaling: number of doublings that lead to ``eta``, >= 0. ``None``: none for problems on which every full
            Newton step succeeds; the others start again from where ``eta`` times the range of the costs is at most 40.
        dtype: float32 or float64 to compute in; ``None``: float64 for float64 costs, else float32. Results have it.
        row_sharded: ``cost`` and ``a`` are this rank's rows of a problem that all ranks of the default process group
            solve together, if there is one; ``b`` is whole on each. Of the result, ``plan`` and ``f`` are this rank's
            rows, all else is joint. Gradients are those of the sum over ranks, as after an ``all_gather``.
        warmstart: column potentials to start from, ``(..., m)``: ``g`` of the result of a similar problem.

    Returns:
        The solutions. ``plan``, ``f``, ``g`` and ``cost`` can be differentiated once, ``value`` twice.

    Raises:
        ValueError: an argument out of range, of wrong shape or type, or weights of unequal sum.

    Example:
        >>> import torch
        >>> result = sinkhorn_newton(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), eta=50.0)
        >>> result.plan
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    solver = SinkhornNewton(
        eta,
        reg,
        warmup=warmup,
        max_newton=max_newton,
        tol=tol,
        sparsity=sparsity,
        nnz_per_row=nnz_per_row,
        eps_scaling=eps_scaling,
        dtype=dtype,
        row_sharded=row_sharded,
    )
    return solver(cost, a, b, warmstart)


class SinkhornNewton(nn.Module):
    """:func:`sinkhorn_newton` with its settings in a module, without parameters; arguments and errors are the same."""

    def __init__(
        self,
        eta: float | None = None,
        reg: float | None = None,
        *,
        warmup: int = 20,
        max_newton: int = 100,
        tol: float | None = None,
        sparsity: Sparsity = "adaptive",
        nnz_per_row: int = 8,
        eps_scaling: int | None = None,
        dtype: torch.dtype | None = None,
        row_sharded: bool = False,
    ) -> None:
        super().__init__()
        if (eta is None) == (reg is None):
            raise ValueError(f"give exactly one of eta and reg (= 1 / eta), got eta={eta} and reg={reg}")
        for name, number in (("eta", eta), ("reg", reg), ("tol", tol)):
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {number}")
        for name, count, low in (
            ("warmup", warmup, 0),
            ("max_newton", max_newton, 0),
            ("nnz_per_row", nnz_per_row, 1),
            ("eps_scaling", 0 if eps_scaling is None else eps_scaling, 0),
        ):
            if count < low:
                raise ValueError(f"{name} must be >= {low}, got {count}")
        if sparsity not in ("adaptive", "topk", "dense"):
            raise ValueError(f"sparsity must be 'adaptive', 'topk' or 'dense', got {sparsity!r}")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32, torch.float64 or None, got {dtype}")
        self.eta = float(eta if eta is not None else 1 / reg)  # type: ignore[operator]
        self.warmup = warmup
        self.max_newton = max_newton
        self.tol = tol
        self.sparsity: Sparsity = sparsity
        self.nnz_per_row = nnz_per_row
        self.eps_scaling = eps_scaling
        self.dtype = dtype
        self.row_sharded = row_sharded

    def forward(
        self, cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, warmstart: Tensor | None = None
    ) -> OTResult:
        """Solve; see :func:`sinkhorn_newton`."""
        batch = cost.shape[:-2]
        cost, shift, a, b, g = self._checked(cost, a, b, warmstart)
        with torch.autocast(cost.device.type, enabled=False):
            with torch.no_grad():
                f, g, plan, stats = _solve(self, cost, a, b, g)
            value = _Value.apply(cost, a, b, f, g, self.eta, self.sharded)
            f, g, plan = _Solution.apply(cost, a, b, f, g, plan, self.eta, self.sharded)
            finite = cost if bool(cost.amax() < math.inf) else torch.where(cost < math.inf, cost, 0.0)
            transported = torch.linalg.vecdot(plan.flatten(1), finite.flatten(1))
        if self.sharded:
            value, transported = (joint_sum(x) for x in (value, transported))
        shifted = _shift_value(shift, a, b, self.sharded)
        value, transported, f, g = value + shifted, transported + shifted, f + shift / 2, g + shift / 2
        return OTResult(*(x.reshape(batch + x.shape[1:]) for x in (plan, f, g, value, transported, *stats)))

    def value(
        self, cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, warmstart: Tensor | None = None
    ) -> Tensor:
        """``forward(...).value`` alone, ``(...)``: its gradient is the plan, for which nothing has to be solved."""
        batch = cost.shape[:-2]
        cost, shift, a, b, g = self._checked(cost, a, b, warmstart)
        with torch.autocast(cost.device.type, enabled=False), torch.no_grad():
            f, g, *_ = _solve(self, cost, a, b, g)
        value = _Value.apply(cost, a, b, f, g, self.eta, self.sharded)
        value = joint_sum(value) if self.sharded else value
        return (value + _shift_value(shift, a, b, self.sharded)).reshape(batch)

    @property
    def sharded(self) -> bool:
        """Whether several ranks solve one problem together."""
        return self.row_sharded and world_size() > 1

    def extra_repr(self) -> str:
        """The settings."""
        return f"eta={self.eta:g}, warmup={self.warmup}, max_newton={self.max_newton}, sparsity={self.sparsity!r}"

    def _checked(
        self, cost: Tensor, a: Tensor | None, b: Tensor | None, g: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The problem as costs ``(B, n, m)``, what was subtracted from them ``(B, 1)``, weights ``(B, n)``, ``(B, m)``.

        The start comes last, ``(B, m)``; all are of the dtype to compute in.
        """
        if not cost.is_floating_point():
            raise ValueError(f"cost must be floating point, got {cost.dtype}")
        if cost.ndim < 2 or cost.numel() == 0:
            raise ValueError(f"cost must have shape (..., n >= 1, m >= 1), got {tuple(cost.shape)}")
        dtype = self.dtype or (torch.float64 if cost.dtype == torch.float64 else torch.float32)
        batch, sizes = cost.shape[:-2], cost.shape[-2:]
        cost = cost.to(dtype).reshape(-1, *sizes)
        row_minima, column_minima = cost.detach().amin(-1), cost.detach().amin(-2)
        if self.sharded:
            dist.all_reduce(column_minima, dist.ReduceOp.MIN)
        smallest = torch.cat([row_minima, column_minima], -1)
        if not bool((smallest > -math.inf).all()):
            raise ValueError("cost must hold no NaN and no -inf")
        if not bool((smallest < math.inf).all()):
            raise ValueError("cost must have a finite entry in every row and every column")
        a, b = checked_weights(cost, batch, sizes, a, b, self.sharded)
        ends = torch.stack([smallest.amin(-1, keepdim=True), -smallest.amax(-1, keepdim=True)])
        low, high = lowest_of_ranks(ends) if self.sharded else ends
        # Where numbers are large beside their differences, eta * cost would lose the differences in rounding.
        far = low.abs() > -high - low
        shift = torch.where(far, low, 0.0)
        if bool(far.any()):
            cost = cost - shift[..., None]
        if g is not None:
            if g.ndim == 0 or g.shape[-1] != sizes[1] or not bool(g.isfinite().all()):
                raise ValueError(
                    f"warmstart must be finite and have shape (..., {sizes[1]}) for this cost, got {tuple(g.shape)}"
                )
            g = g.detach().to(cost).expand(*batch, sizes[1]).reshape(-1, sizes[1])
        return cost, shift, a, b, g


def checked_weights(
    like: Tensor, batch: torch.Size, sizes: torch.Size, a: Tensor | None, b: Tensor | None, sharded: bool
) -> tuple[Tensor, Tensor]:
    """Weights ``(B, n)`` and ``(B, m)`` of ``sizes`` = (n, m), of the dtype and on the device of ``like``."""
    rows = total_rows(like.new_zeros(1, sizes[0]), sharded)[1].item()
    weights = []
    for name, given, size, number in (("a", a, sizes[0], rows), ("b", b, sizes[1], sizes[1])):
        w = like.new_full((size,), 1 / number) if given is None else given
        if not w.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {w.dtype}")
        if w.ndim == 0 or w.shape[-1] != size:
            raise ValueError(f"{name} must have shape (..., {size}) for this cost, got {tuple(w.shape)}")
        if not bool(((w >= 0) & (w < math.inf)).all()):
            raise ValueError(f"{name} must be >= 0 and finite, got {w}")
        weights.append(w.to(like).expand(*batch, size).reshape(-1, size))
    a, b = weights
    masses = [total_rows(a.detach().double(), sharded)[0][:, 0], b.detach().double().sum(-1)]
    if bool(((masses[0] - masses[1]).abs() > 1e-6 * masses[0]).any()):
        raise ValueError(f"a and b must have equal sums, got {masses[0].tolist()} and {masses[1].tolist()}")
    if not bool((masses[1] > 0).all()):
        raise ValueError(f"a and b must have a sum > 0, got {masses[1].tolist()}")
    least = (torch.finfo(like.dtype).eps * masses[1]).to(like)[:, None]
    return a + (a == 0) * (least / rows), b + (b == 0) * (least / sizes[1])


def _shift_value(shift: Tensor, a: Tensor, b: Tensor, sharded: bool) -> Tensor:
    """What adding ``shift`` (B, 1) to all costs adds to their transport, ``(B,)``; half of it through each weight."""
    total = a.sum(-1, keepdim=True)
    total = joint_sum(total) if sharded else total
    return (shift * (total + b.sum(-1, keepdim=True)) / 2)[:, 0]


def _plan(cost: Tensor, f: Tensor, g: Tensor, eta: float) -> Tensor:
    plan = torch.sub((eta * f - 1)[..., None] + (eta * g)[..., None, :], cost, alpha=eta)
    return _drop_underflow(plan.clamp_(min=lowest_exponent(plan.dtype)).exp_())


def _drop_underflow(plan: Tensor) -> Tensor:
    """Make what is left of forbidden and far too expensive pairs exactly 0, in place."""
    return nn.functional.threshold(plan, torch.finfo(plan.dtype).tiny ** 0.8, 0.0, inplace=True)


class _Value(torch.autograd.Function):
    """The optimal value at given optimal potentials; differentiating its gradient goes through ``_Solution``.

    With sharded rows, this rank's part of it.
    """

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eta: float, sharded: bool
    ) -> Tensor:
        ctx.save_for_backward(cost, a, b, f, g)
        ctx.eta, ctx.sharded = eta, sharded
        return (a * f).sum(-1) - a.sum(-1) / eta + share_of_rank(b * g, sharded).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cost, a, b, f, g = ctx.saved_tensors
        weight, plan = grads[0][:, None], None
        if ctx.needs_input_grad[0]:
            with torch.no_grad():
                plan = _plan(cost, f, g, ctx.eta)
            if torch.is_grad_enabled():
                f, g, plan = _Solution.apply(cost, a, b, f, g, plan, ctx.eta, ctx.sharded)
        grad_cost = None if plan is None else weight[..., None] * plan
        return grad_cost, weight * f, weight * share_of_rank(g, ctx.sharded), None, None, None, None


def share_of_rank(x: Tensor, sharded: bool) -> Tensor:
    """This rank's part of what all ranks hold alike."""
    return x / world_size() if sharded else x


class _Solution(torch.autograd.Function):
    """The identity on solved potentials and plan, with their derivative (implicit function theorem)."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, plan: Tensor, eta: float, sharded: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        f, g, plan = f.view_as(f), g.view_as(g), plan.view_as(plan)
        ctx.save_for_backward(cost, a, b, plan)
        ctx.eta, ctx.sharded = eta, sharded
        return f, g, plan

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cost, a, b, plan = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
            x, y = (torch.zeros_like(w) if grad is None else grad for w, grad in zip((a, b), grads[:2], strict=True))
            y = sum_ranks(y.clone(), ctx.sharded)
            total, number = total_rows(x, ctx.sharded)
            excess = (total - y.sum(-1, keepdim=True)) / 2  # the adjoint of giving both potentials equal means
            x, y = x - excess / number, y + excess / y.shape[-1]
            moved = None if grads[2] is None else ctx.eta * grads[2] * plan
            if moved is not None:
                x, y = x + moved.sum(-1), y + sum_ranks(moved.sum(-2), ctx.sharded)
            u, w = hessian_solve(plan, x, y, ctx.sharded)
            grad_cost = plan * (u[..., None] + w[..., None, :])
            if moved is not None:
                grad_cost -= moved
            results = grad_cost, u / ctx.eta, share_of_rank(w / ctx.eta, ctx.sharded)
        if torch.is_grad_enabled():
            given = [grad for grad in grads if grad is not None]
            results = tuple(NoSecondDerivative.apply(result, *given, cost, a, b) for result in results)
        return *results, None, None, None, None, None


class NoSecondDerivative(torch.autograd.Function):
    """The identity on a gradient; whoever differentiates it learns that this cannot be done."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "Second derivatives of an optimal transport plan, its potentials, its cost or a tiled value are not "
            "implemented; those of `value` are."
        )


Stats = tuple[Tensor, Tensor, Tensor, Tensor]  # sweeps, steps, marginal error, converged


def _solve(
    solver: SinkhornNewton, cost: Tensor, a: Tensor, b: Tensor, g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Stats]:
    """Potentials, plan and what it took, for problems ``(B, n, m)``; ``g`` is a start."""
    eta, sharded = solver.eta, solver.sharded
    if cost.shape[-1] > cost.shape[-2] and not sharded:
        f = None if g is None else (a.log() - torch.logsumexp(eta * (g[:, None] - cost), -1)) / eta
        g, f, plan, stats = _solve(solver, cost.mT.contiguous(), b, a, f)
        return f, g, plan.mT, stats
    mass = b.sum(-1, keepdim=True)
    a, b = a / total_rows(a, sharded)[0], b / mass
    cost = cost.contiguous()
    low, high = cost.amin((-2, -1)), cost.amax((-2, -1))
    if bool((high == math.inf).any()):
        high = torch.where(cost < math.inf, cost, -math.inf).amax((-2, -1))
    if sharded:
        low, high = lowest_of_ranks(low), -lowest_of_ranks(-high)
    dual = DenseDual(cost, eta, a, b, torch.empty_like(cost), solver.sparsity, solver.nnz_per_row, sharded)
    v = torch.zeros_like(b) if g is None else eta * g
    end, stats = maximise(dual, solver, v, eta * float((high - low).max()))
    f, g = equal_means((end.u + mass.log() + 1) / eta, end.v / eta, sharded)
    return f, g, _drop_underflow(dual.plan.mul_(mass[..., None])), stats


def lowest_of_ranks(x: Tensor) -> Tensor:
    """Elementwise minimum over the ranks, in place."""
    dist.all_reduce(x, dist.ReduceOp.MIN)
    return x


def maximise(dual: SemiDual, solver: SinkhornNewton, v: Tensor, extent: float) -> tuple[Point, Stats]:
    """The maximum of the dual, from ``v``; ``extent`` is the range of ``eta cost``."""
    eps = torch.finfo(v.dtype).eps
    tol = solver.tol or min(max(1e-10 if v.dtype == torch.float64 else 1e-5, eps * extent / 16), 1e-2)
    may_restart = solver.eps_scaling is None and solver.max_newton > 0 and extent > _SCALED_RANGE
    end, sweeps, steps = _ascend(dual, solver, v, solver.eps_scaling or 0, tol, 1 if may_restart else 3)
    hard = end.error > tol
    if may_restart and bool(hard.any()):
        part = dual if bool(hard.all()) else dual.subset(hard)
        doublings = math.ceil(math.log2(extent / _SCALED_RANGE))
        rest, more_sweeps, more_steps = _ascend(part, solver, torch.zeros_like(part.b), doublings, tol, 3)
        if part is not dual:
            dual.replace(hard, part)
        end = end.replaced(hard, rest)
        sweeps[hard] += more_sweeps
        steps[hard] += more_steps
    return end, (sweeps, steps, end.error, end.error <= tol)


def _ascend(
    dual: SemiDual, solver: SinkhornNewton, v: Tensor, doublings: int, tol: float, trials: int
) -> tuple[Point, Tensor, Tensor]:
    """Both stages of the algorithm, at ``eta / 2^doublings`` first; the end, sweeps and steps."""
    steps = torch.zeros(len(v), dtype=torch.int64, device=v.device)
    sweeps = 0
    v = v / 2.0**doublings
    for stage in range(doublings + 1):
        scale = 2.0 ** (stage - doublings)
        last = stage == doublings
        count = solver.warmup if stage == 0 else min(2, solver.warmup)
        target, most = (tol, solver.max_newton) if last else (_STAGE_TOL, 20)
        v, done = dual.sweep(scale, v if stage == 0 else 2 * v, count, target)
        end, taken = _newton(dual, scale, v, target, most, trials)
        v = end.v
        sweeps += done
        steps += taken
    return end, torch.full_like(steps, sweeps), steps


def _newton(dual: SemiDual, scale: float, v: Tensor, tol: float, max_steps: int, trials: int) -> tuple[Point, Tensor]:
    """Damped Newton ascent on the semi-dual ``max_u f(u, v)`` until the column sums err by at most ``tol``.

    The line search makes that many ``trials`` along a direction, then a new one with more damping is sought; with one
    trial, a problem whose full step fails is given up instead.

    Returns the end and the number of steps of each problem.
    """
    at = dual.at(scale, v)
    steps = torch.zeros(len(v), dtype=torch.int64, device=v.device)
    damping = torch.full_like(v[:, :1], 0.3)
    near = torch.finfo(v.dtype).eps ** 0.25  # an error whose square, which is what a step gains, is lost in rounding
    for step in range(max_steps):
        active = (at.error > tol) & (damping[:, 0] < 1e12)
        count = int(active.sum())
        if count == 0:
            break
        if 2 * count <= len(v):
            part = dual.subset(active)
            rest, more = _newton(part, scale, at.v[active], tol, max_steps - step, trials)
            dual.replace(active, part)
            steps[active] += more
            return at.replaced(active, rest), steps
        steps += active
        gradient = torch.where(active[:, None], dual.b - at.columns, 0.0)
        direction = dual.direction(scale, at, gradient, damping * at.error[:, None].clamp(max=1))
        slope = (gradient * direction).sum(-1)
        pending, alpha, new = active, 1.0, at
        for _ in range(trials):
            new = dual.at(scale, torch.where(pending[:, None], at.v + alpha * direction, new.v))
            gain = new.objective - at.objective
            accepted = (gain >= 1e-4 * alpha * slope) | ((new.error < at.error) & (at.error < near))
            accepted &= torch.isfinite(new.error) & pending
            good = accepted & ((gain >= 0.25 * slope) | (at.error < near)) & (alpha == 1.0)
            damping = torch.where(good[:, None], damping / 4, damping)
            pending = pending & ~accepted
            if not bool(pending.any()):
                break
            alpha /= 4
            raised = (4 * damping).clamp(min=math.inf if trials == 1 else 1e-3)
            damping = torch.where(pending[:, None], raised, damping)
        else:
            new = dual.at(scale, torch.where(pending[:, None], at.v, new.v))
        at = new
    return at, steps
