"""Minimisers of SSO's surrogate: each moves the parameters of a :class:`TargetSurrogate` and reports what it did."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.optim import LBFGS, Optimizer

from lit_methods.optim.foundation.flat import is_dtensor, local_tensor
from lit_methods.optim.foundation.groups import (
    check_at_least,
    check_factor,
    check_nonnegative,
    check_positive,
    check_share,
)
from lit_methods.optim.sso.surrogate import TargetSurrogate, inner_product

__all__ = ["ArmijoDescent", "ConjugateGradient", "GaussNewton", "InnerSolver", "OptimizerSteps", "StrongWolfeLBFGS"]


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


def _adam(params: list[Tensor]) -> Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


@dataclass(frozen=True)
class InnerSolver(ABC):
    """How SSO minimises its surrogate in one step; abstract."""

    steps: int = 10
    tol: float = 1e-6
    sync_every: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, sync_every=self.sync_every)
        check_nonnegative(tol=self.tol)

    def prepare(self, params: list[list[Tensor]]) -> Optimizer | None:
        """The optimizer that lasts over steps, with a group for each list of parameters; None where none does."""
        return None

    @abstractmethod
    def solve(
        self, surrogate: TargetSurrogate, steps: int, state: dict[str, Any], lasting: Optimizer | None
    ) -> InnerResult:
        """Take at most ``steps`` inner steps; ``state`` is SSO's, ``lasting`` what :meth:`prepare` gave."""


@dataclass(frozen=True)
class GaussNewton(InnerSolver):
    """Steepest descent whose step length is exact for linear networks, from one Jacobian-vector product.

    The length |g|² / gᵀBg is halved until Armijo's condition holds; it does at once when the network is linear. An
    inner step costs a forward and a backward pass, and a forward pass with tangents, or three without where the network
    or its sharding (FSDP2) lacks forward-mode derivatives.

    Args:
        steps: m, number of inner steps at most, >= 1.
        tol: the inner steps stop when the surrogate's gradient is not longer, >= 0.
        sync_every: with several ranks, inner steps that each takes alone before parameters are averaged, >= 1; 1:
            exact.
        armijo_c: share of the linear decrease that an inner step must reach, in (0, 1); at most 0.5 to accept exact
            steps.

    Raises:
        ValueError: an argument out of range.
    """

    armijo_c: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(armijo_c=self.armijo_c)

    def solve(
        self, surrogate: TargetSurrogate, steps: int, state: dict[str, Any], lasting: Optimizer | None
    ) -> InnerResult:
        """Take at most ``steps`` inner steps."""
        step_size = state.get("inner_step_size", 1.0)
        value = before = surrogate.value()
        for k in range(steps):
            gradient = surrogate.gradient()
            slope = inner_product(gradient, gradient)
            if not math.sqrt(slope) > self.tol:
                return InnerResult(before, value, k, step_size)
            curvature = surrogate.curvature(gradient)
            exact = slope / curvature if curvature > 0 else 2 * step_size
            found = _line_search(
                surrogate, gradient, slope, value, exact, self.armijo_c, decay=0.5, trials=30, graph=k + 1 < steps
            )
            if found is None:
                return InnerResult(before, value, k, step_size)
            value, step_size = found
        return InnerResult(before, value, steps, step_size)


@dataclass(frozen=True)
class ConjugateGradient(InnerSolver):
    """One Gauss-Newton step, its linear system solved by ``steps`` iterations of conjugate gradients from zero.

    Exact for linear networks once ``steps`` reaches the rank of the Jacobian. For others long solutions leave the
    region where the network is linear: of the iterates 1, 2, 4, 8, ... and the last, back from the last, the first
    local minimum of the surrogate is taken (Martens, "Deep learning via Hessian-free optimization", ICML 2010,
    section 4.6). An iteration is a forward pass with tangents and a backward pass; log2(steps) copies of the
    parameters are kept.

    Args:
        steps: iterations at most, >= 1.
        tol: the iterations stop when the residual is not longer, >= 0.
        sync_every: with several ranks, iterations that each takes alone before parameters are averaged, >= 1; 1:
            exact.
        armijo_c: share of the linear decrease that a gradient step must reach where no iterate improves, in (0, 1).

    Raises:
        ValueError: an argument out of range.
    """

    armijo_c: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(armijo_c=self.armijo_c)

    def solve(
        self, surrogate: TargetSurrogate, steps: int, state: dict[str, Any], lasting: Optimizer | None
    ) -> InnerResult:
        """Take one step, of at most ``steps`` iterations."""
        before = surrogate.value()
        gradient = surrogate.gradient()
        residual = [-g for g in gradient]
        solution = [torch.zeros_like(g) for g in gradient]
        direction = [r.clone() for r in residual]
        squared = inner_product(residual, residual)
        iterates: list[list[Tensor]] = []
        taken = 0
        while taken < steps and math.sqrt(squared) > self.tol:
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
        surrogate.remember()
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
        found = _line_search(surrogate, gradient, slope, before, 1.0, self.armijo_c, decay=0.5, trials=30, graph=False)
        return InnerResult(before, *((found[0], taken, found[1]) if found else (before, taken, 0.0)))


@dataclass(frozen=True)
class ArmijoDescent(InnerSolver):
    """Gradient descent with Armijo backtracking, the authors' inner loop.

    Args:
        steps: m, number of inner steps at most, >= 1.
        tol: the inner steps stop when the surrogate's gradient is not longer, >= 0.
        sync_every: with several ranks, inner steps that each takes alone before parameters are averaged, >= 1; 1:
            exact.
        armijo_c: share of the linear decrease that an inner step must reach, in (0, 1).
        lr: length of the first trial, before it grows, > 0.
        grow: factor of the step before each inner step, >= 1. The authors take 2^(1/batches per epoch).

    Raises:
        ValueError: an argument out of range.
    """

    armijo_c: float = 0.1
    lr: float = 10.0
    grow: float = 1.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(armijo_c=self.armijo_c)
        check_positive(lr=self.lr)
        check_factor(grow=self.grow)

    def solve(
        self, surrogate: TargetSurrogate, steps: int, state: dict[str, Any], lasting: Optimizer | None
    ) -> InnerResult:
        """Take at most ``steps`` inner steps; a step that falls below 1e-6 ends them."""
        value = before = surrogate.value()
        step_size = self.lr
        for k in range(steps):
            if k:
                surrogate.value()
            gradient = surrogate.gradient()
            slope = inner_product(gradient, gradient)
            if not math.sqrt(slope) > self.tol:
                return InnerResult(before, value, k, step_size)
            length = self.grow * step_size
            found = _line_search(
                surrogate, gradient, slope, value, length, self.armijo_c, decay=0.9, trials=100, graph=False, least=1e-6
            )
            if found is None:
                return InnerResult(before, value, k, step_size)
            value, step_size = found
        return InnerResult(before, value, steps, step_size)


@dataclass(frozen=True)
class StrongWolfeLBFGS(InnerSolver):
    """``torch.optim.LBFGS`` with a strong Wolfe line search; a result that is no improvement is dropped.

    Args:
        steps: iterations at most, >= 1.
        tol: the iterations stop when no entry of the surrogate's gradient is larger, >= 0.
        sync_every: with several ranks, iterations that each takes alone before parameters are averaged, >= 1; 1:
            exact.

    Raises:
        ValueError: an argument out of range.
    """

    def solve(
        self, surrogate: TargetSurrogate, steps: int, state: dict[str, Any], lasting: Optimizer | None
    ) -> InnerResult:
        """Take at most ``steps`` iterations."""
        kept = _detach_grads(surrogate.params)
        surrogate.remember()
        joined = JoinedShards(surrogate.params) if any(is_dtensor(p) for p in surrogate.params) else None
        solver = LBFGS(
            surrogate.params if joined is None else [joined.vector],
            max_iter=steps,
            tolerance_grad=self.tol,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        values: list[float] = []

        def closure() -> Tensor:
            if joined is not None:
                joined.write()
            values.append(surrogate.value())
            gradient = surrogate.gradient()
            if joined is not None:
                joined.vector.grad = joined.join(gradient)
            else:
                for p, g in zip(surrogate.params, gradient, strict=True):
                    p.grad = g
            return torch.tensor(values[-1], dtype=torch.float64)

        solver.step(closure)
        if joined is not None:
            joined.write()
        after = surrogate.value(graph=False)
        if not after <= values[0]:
            surrogate.restore()
            after = values[0]
        _restore_grads(surrogate.params, kept)
        return InnerResult(values[0], after, solver.state[solver.param_groups[0]["params"][0]].get("n_iter", 0), 1.0)


class JoinedShards:
    """All DTensor parameters as one vector of which every rank holds as much: torch's L-BFGS cannot join uneven shards.

    Args:
        params: sharded alike.

    Attributes:
        vector: the parameters, each rank's part padded by zeros.

    Raises:
        RuntimeError: the parameters are not sharded alike.
    """

    def __init__(self, params: list[Any]) -> None:
        layouts = {
            (p.device_mesh, tuple(s.is_shard() for s in p.placements)) if is_dtensor(p) else None for p in params
        }
        if len(layouts) != 1:
            raise RuntimeError(
                "StrongWolfeLBFGS needs parameters that are all sharded over the same ranks: fully_shard the root "
                "module, or take another inner solver"
            )
        self._params = params
        self._sizes = [local_tensor(p).numel() for p in params]
        self._width = torch.tensor(sum(self._sizes), device=local_tensor(params[0]).device)
        dist.all_reduce(self._width, dist.ReduceOp.MAX)
        self.vector = self.join(params).requires_grad_()

    def join(self, tensors: list[Any]) -> Any:
        """Tensors shaped and placed like the parameters as one vector."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        local = torch.cat([local_tensor(x).detach().flatten() for x in tensors])
        padded = functional.pad(local, (0, int(self._width) - len(local)))
        first = self._params[0]
        placements = [Shard(0) if s.is_shard() else Replicate() for s in first.placements]
        return DTensor.from_local(padded, first.device_mesh, placements, run_check=False)

    @torch.no_grad()
    def write(self) -> None:
        """Give the parameters the vector's values."""
        parts = local_tensor(self.vector)[: sum(self._sizes)].split(self._sizes)
        for p, part in zip(self._params, parts, strict=True):
            local_tensor(p).copy_(part.view_as(local_tensor(p)))


@dataclass(frozen=True)
class OptimizerSteps(InnerSolver):
    """Steps of any torch optimizer, whose state lasts over SSO's steps; undone when they end at a value not finite.

    Args:
        steps: m, number of inner steps at most, >= 1.
        tol: the inner steps stop when the surrogate's gradient is not longer, >= 0.
        sync_every: with several ranks, inner steps that each takes alone before parameters are averaged, >= 1; 1:
            exact. With more, the states are each rank's own, and only the first rank's is saved.
        optimizer: builds it from the list of parameters.

    Raises:
        ValueError: an argument out of range.
    """

    optimizer: Callable[[list[Tensor]], Optimizer] = _adam

    def prepare(self, params: list[list[Tensor]]) -> Optimizer | None:
        """Build the optimizer for the first group, and give it the others as groups with the same settings."""
        lasting = self.optimizer(params[0])
        for further in params[1:]:
            lasting.add_param_group({"params": further})
        return lasting

    def solve(
        self, surrogate: TargetSurrogate, steps: int, state: dict[str, Any], lasting: Optimizer | None
    ) -> InnerResult:
        """Take at most ``steps`` inner steps."""
        assert lasting is not None
        kept = _detach_grads(surrogate.params)
        surrogate.remember()
        before, taken = math.nan, 0
        for k in range(steps):
            value = surrogate.value()
            before = value if k == 0 else before
            gradient = surrogate.gradient()
            if not math.sqrt(inner_product(gradient, gradient)) > self.tol:
                break
            for p, g in zip(surrogate.params, gradient, strict=True):
                p.grad = g
            lasting.step()
            taken += 1
        after = surrogate.value(graph=False)
        if not math.isfinite(after):
            surrogate.restore()
        _restore_grads(surrogate.params, kept)
        return InnerResult(before, after, taken, lasting.param_groups[0].get("lr", math.nan))


_SHORTHANDS: dict[str, InnerSolver] = {
    "gauss_newton": GaussNewton(),
    "cg": ConjugateGradient(),
    "lbfgs": StrongWolfeLBFGS(),
    "armijo": ArmijoDescent(),
    "adam": OptimizerSteps(),
}


def inner_solver(inner: "str | InnerSolver | Callable[[list[Tensor]], Optimizer]") -> InnerSolver:
    """The solver that ``inner`` means: a name, a solver, or what builds a torch optimizer."""
    if isinstance(inner, InnerSolver):
        return inner
    if isinstance(inner, str):
        if inner not in _SHORTHANDS:
            names = ", ".join(map(repr, _SHORTHANDS))
            raise ValueError(f"inner must be one of {names}, a solver or a function of the parameters, got {inner!r}")
        return _SHORTHANDS[inner]
    return OptimizerSteps(optimizer=inner)


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
    surrogate.remember()
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


def _detach_grads(params: list[Tensor]) -> list[Tensor | None]:
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    return grads


def _restore_grads(params: list[Tensor], grads: list[Tensor | None]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g
