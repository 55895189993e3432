"""Minimisers of SSO's surrogate: each moves the parameters of a :class:`TargetSurrogate` and reports what it did."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lit_methods.optim.sso.surrogate import TargetSurrogate, inner_product


class InnerResult(NamedTuple):
    """What a solver did.

    Attributes:
        before: the surrogate at the start.
        after: at the end.
        steps: inner steps taken.
        step_size: the last one that was accepted.
    """

    before: float
    after: float
    steps: int
    step_size: float


def gauss_newton(surrogate: TargetSurrogate, steps: int, tol: float, armijo_c: float, step_size: float) -> InnerResult:
    """Steepest descent whose step length is exact for linear networks, from one Jacobian-vector product.

    The length |g|² / gᵀBg is halved until Armijo's condition holds; it does at once when the network is linear.

    Args:
        surrogate: what is minimised.
        steps: number of inner steps, at most.
        tol: stop when the gradient's norm is not above it.
        armijo_c: demanded share of the linear decrease.
        step_size: length of the trial step where the network has no forward-mode derivative.
    """
    value = before = surrogate.value()
    for k in range(steps):
        gradient = surrogate.gradient()
        slope = inner_product(gradient, gradient)
        if not math.sqrt(slope) > tol:
            return InnerResult(before, value, k, step_size)
        curvature = surrogate.curvature(gradient, value, slope, step_size)
        exact = slope / curvature if curvature > 0 else 2 * step_size
        found = _line_search(
            surrogate, gradient, slope, value, exact, armijo_c, decay=0.5, trials=30, graph=k + 1 < steps
        )
        if found is None:
            return InnerResult(before, value, k, step_size)
        value, step_size = found
    return InnerResult(before, value, steps, step_size)


def conjugate_gradient(surrogate: TargetSurrogate, steps: int, tol: float, armijo_c: float) -> InnerResult:
    """One Gauss-Newton step, its linear system solved by ``steps`` iterations of conjugate gradients from zero.

    Exact for linear networks once ``steps`` reaches the rank of the Jacobian. For others long solutions leave the
    region where the network is linear: of the iterates 1, 2, 4, 8, ... and the last, back from the last, the first
    local minimum of the surrogate is taken (Martens, "Deep learning via Hessian-free optimization", ICML 2010,
    section 4.6). An iteration is a forward pass with tangents and a backward pass; log2(steps) copies of the
    parameters are kept.
    """
    before = surrogate.value()
    gradient = surrogate.gradient()
    residual = [-g for g in gradient]
    solution = [torch.zeros_like(g) for g in gradient]
    direction = [r.clone() for r in residual]
    squared = inner_product(residual, residual)
    iterates: list[list[Tensor]] = []
    taken = 0
    while taken < steps and math.sqrt(squared) > tol:
        product = surrogate.gauss_newton_product(direction)
        curvature = inner_product(direction, product)
        if not curvature > 0:
            break
        torch._foreach_add_(solution, direction, alpha=squared / curvature)
        torch._foreach_add_(residual, product, alpha=-squared / curvature)
        previous, squared = squared, inner_product(residual, residual)
        direction = [r + squared / previous * d for r, d in zip(residual, direction, strict=True)]
        taken += 1
        if taken.bit_count() == 1:
            iterates.append([x.clone() for x in solution])
    if taken.bit_count() > 1:
        iterates.append(solution)
    surrogate.anchor()
    after, chosen = before, None
    for iterate in reversed(iterates):
        surrogate.move(iterate, 1.0)
        value = surrogate.value(graph=False)
        if chosen is not None and not value < after:
            break
        if value < after:
            after, chosen = value, iterate
    if chosen is not None:
        surrogate.move(chosen, 1.0)
        return InnerResult(before, after, taken, 1.0)
    surrogate.restore()
    slope = inner_product(gradient, gradient)
    found = _line_search(surrogate, gradient, slope, before, 1.0, armijo_c, decay=0.5, trials=30, graph=False)
    return InnerResult(before, *((found[0], taken, found[1]) if found else (before, taken, 0.0)))


def armijo_descent(
    surrogate: TargetSurrogate,
    steps: int,
    tol: float,
    armijo_c: float,
    step_size: float,
    *,
    grow: float,
    decay: float = 0.9,
    trials: int = 100,
    least: float = 1e-6,
) -> InnerResult:
    """Gradient descent with Armijo backtracking, the authors' inner loop.

    Args:
        surrogate: what is minimised.
        steps: number of inner steps, at most.
        tol: stop when the gradient's norm is not above it.
        armijo_c: demanded share of the linear decrease.
        step_size: length of the first trial, before it grows.
        grow: factor of the step before each inner step, >= 1.
        decay: factor of the step after a rejected trial.
        trials: give up after so many.
        least: give up when the step falls below.
    """
    value = before = surrogate.value()
    for k in range(steps):
        if k:
            surrogate.value()
        gradient = surrogate.gradient()
        slope = inner_product(gradient, gradient)
        if not math.sqrt(slope) > tol:
            return InnerResult(before, value, k, step_size)
        found = _line_search(
            surrogate, gradient, slope, value, grow * step_size, armijo_c, decay, trials, graph=False, least=least
        )
        if found is None:
            return InnerResult(before, value, k, step_size)
        value, step_size = found
    return InnerResult(before, value, steps, step_size)


def lbfgs(surrogate: TargetSurrogate, steps: int, tol: float) -> InnerResult:
    """``torch.optim.LBFGS`` with a strong Wolfe line search; a result that is no improvement is dropped."""
    kept = _take_grads(surrogate.params)
    surrogate.anchor()
    solver = LBFGS(
        surrogate.params, max_iter=steps, tolerance_grad=tol, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )
    values: list[float] = []

    def closure() -> Tensor:
        values.append(surrogate.value())
        for p, g in zip(surrogate.params, surrogate.gradient(), strict=True):
            p.grad = g
        return torch.tensor(values[-1], dtype=torch.float64)

    solver.step(closure)
    after = surrogate.value(graph=False)
    if not after <= values[0]:
        surrogate.restore()
        after = values[0]
    _give_grads_back(surrogate.params, kept)
    return InnerResult(values[0], after, solver.state[surrogate.params[0]].get("n_iter", 0), 1.0)


def optimizer_steps(surrogate: TargetSurrogate, optimizer: Optimizer, steps: int, tol: float) -> InnerResult:
    """Steps of any torch optimizer over the surrogate's parameters; undone when they end at a value not finite."""
    kept = _take_grads(surrogate.params)
    surrogate.anchor()
    before, taken = math.nan, 0
    for k in range(steps):
        value = surrogate.value()
        before = value if k == 0 else before
        gradient = surrogate.gradient()
        if not math.sqrt(inner_product(gradient, gradient)) > tol:
            break
        for p, g in zip(surrogate.params, gradient, strict=True):
            p.grad = g
        optimizer.step()
        taken += 1
    after = surrogate.value(graph=False)
    if not math.isfinite(after):
        surrogate.restore()
    _give_grads_back(surrogate.params, kept)
    return InnerResult(before, after, taken, optimizer.param_groups[0].get("lr", math.nan))


def _line_search(
    surrogate: TargetSurrogate,
    gradient: list[Tensor],
    slope: float,
    value: float,
    length: float,
    armijo_c: float,
    decay: float,
    trials: int,
    graph: bool,
    least: float = 0.0,
) -> tuple[float, float] | None:
    """Go along ``-gradient``; the new value and the accepted length, or None and unchanged parameters."""
    surrogate.anchor()
    for _ in range(trials):
        surrogate.move(gradient, -length)
        new = surrogate.value(graph)
        if new <= value - armijo_c * length * slope:
            return new, length
        length *= decay
        if length < least:
            break
    surrogate.restore()
    return None


def _take_grads(params: list[Tensor]) -> list[Tensor | None]:
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    return grads


def _give_grads_back(params: list[Tensor], grads: list[Tensor | None]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g
