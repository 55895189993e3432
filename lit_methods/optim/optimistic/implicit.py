r"""Optimistic online mirror descent with implicit updates, for losses that are not smooth.

The extension of arXiv 2302.04552 in JMLR 25(178), 2024: the guess of the next loss is the last *function*, not its
gradient. The form below is recalled from the paper, not read in it.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_methods.optim.constraints import Constraint, apply_constraint
from lit_methods.optim.foundation.groups import check_positive
from lit_methods.optim.foundation.states import state_dtype
from lit_methods.optim.optimistic.base import (
    OnlineOptimizer,
    check_constraint,
    left_out,
    loss_gradient,
    start_inside,
)

__all__ = ["ImplicitOMD", "prox_absolute", "prox_hinge"]

Prox = Callable[[Tensor, Tensor], Tensor]


class ImplicitOMD(OnlineOptimizer):
    r"""Euclidean optimistic mirror descent that plays a proximal point of the last loss.

    After the gradient :math:`g_t` at the played point,

    .. math::
        \hat x_{t+1} = \Pi[\hat x_t - \eta_t g_t], \qquad
        x_{t+1} = \arg\min_{x \in X} f_t(x) + \|x - \hat x_{t+1}\|^2 / (2 \eta_{t+1}),

    with :math:`\eta_t = lr / \sqrt{4 G^2 + \sum_{s<t} \|\nabla f_s(x_s) - \nabla f_{s-1}(x_s)\|^2}`: gradients of
    successive functions at one point are compared, so no smoothness is needed.

    :meth:`step` needs a closure that evaluates the same loss whenever it is called. Without ``prox`` the proximal point
    is approximated by ``inner_steps`` gradient steps of size :math:`2 \eta / (j + 1)`, j = 1, 2, ... The closure is
    called ``2 + inner_steps`` times (twice with ``prox``), each time with gradients enabled: once at the played point,
    in the inner steps, and once at the next point, where the gradient of the last loss is kept. In a Lightning Trainer
    each call repeats ``training_step``. Under DDP each call averages gradients, so ranks stay identical.

    State: 8 bytes a parameter, and as much again during a step. Parameters without a gradient stay where they are, and
    the others move in what these leave of a set that all share. A start outside of the set is projected, with a
    warning. Host synchronisations: one after each call of the closure, to see whether the gradients are finite: if not,
    the step changes nothing, and the first such step warns.

    Args:
        params: parameters, named parameters or groups.
        lr: the diameter D of the set, >= 0.
        inner_steps: gradient steps for the proximal point, >= 1.
        grad_bound: G > 0; None takes the largest gradient norm so far (practical, not in the paper).
        constraint: a set of :mod:`lit_methods.optim.constraints`, or your own orthogonal projection of one tensor.
        weight_decay: L2 coefficient >= 0, part of the loss.
        maximize: ascend.

    Raises:
        ValueError: a hyperparameter out of range, or DTensor parameters.
        RuntimeError: in :meth:`step`, without a closure (as under a GradScaler, 16-mixed; use bf16-mixed), or for
            sparse gradients.
    """

    state_names = (
        "x_hat",
        "guess",
        "variation",
        "max_square",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        inner_steps: int = 5,
        *,
        grad_bound: float | None = None,
        constraint: Constraint | Callable[[Tensor], Tensor] | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        if inner_steps < 1:
            raise ValueError(f"inner_steps must be >= 1, got {inner_steps}")
        check_constraint(constraint)
        self._inner_steps = inner_steps
        self._constraint = constraint
        super().__init__(
            params, {"lr": lr, "grad_bound": grad_bound, "weight_decay": weight_decay, "maximize": maximize}
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inner_steps": self._inner_steps, "_constraint": self._constraint}

    def _check_group(self, group: dict[str, Any]) -> None:
        check_positive(grad_bound=group["grad_bound"])
        if not 0 <= group["weight_decay"] < float("inf"):
            raise ValueError(f"weight_decay must be >= 0 and finite, got {group['weight_decay']}")
        if not any(p.is_meta for p in group["params"]):
            with torch.no_grad():
                points = [p.to(state_dtype(p)) for p in group["params"]]
                start_inside(group["params"], apply_constraint(self._constraint, points))

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, prox: Prox | None = None
    ) -> float | None:
        """Take one round.

        Args:
            closure: sets the gradients at the present parameters (zeroing them first) and returns the loss.
            prox: ``prox(x_hat, eta)`` returns the proximal point of the loss (within the constraint, if there is one),
                for an optimizer of a single parameter; see :func:`prox_absolute` and :func:`prox_hinge`.

        Returns:
            The loss at the played point.
        """
        groups = [group for group in self.param_groups if group["lr"] > 0]
        if closure is None and groups:
            raise RuntimeError(
                "ImplicitOMD.step needs a closure, which a GradScaler (16-mixed) does not pass: use bf16-mixed"
            )
        if closure is None:
            return None
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        active = [(group, [p for p in group["params"] if p.grad is not None]) for group in groups]
        active = [(group, params) for group, params in active if params]
        moving = [p for _, params in active for p in params]
        if not self._accepts(moving):
            return loss
        known = [p for group, _ in active for p in group["params"] if p in self.state]  # they share some numbers
        points, states = [p.clone() for p in moving], copy.deepcopy([self.state[p] for p in known])
        if not self._play(active, evaluate, prox):
            for p, point in zip(moving, points, strict=True):
                p.copy_(point)
                self.state.pop(p, None)
            self.state.update(zip(known, states, strict=True))
        return loss

    def _play(
        self, active: list[tuple[dict[str, Any], list[Tensor]]], evaluate: Callable[[], Any], prox: Prox | None
    ) -> bool:
        """From the first gradient to the guess at the next point; False when a gradient on the way is not finite."""
        moving = [p for _, params in active for p in params]
        steps = [self._learn(group, params) for group, params in active]
        for j in range(1, self._inner_steps + 1 if prox is None else 2):
            if prox is None:
                evaluate()
                if not self._accepts(moving):
                    return False
            for (group, params), eta in zip(active, steps, strict=True):
                x_hats = [self.state[p]["x_hat"] for p in params]
                if prox is not None:
                    self._write_played(group, params, [prox(x_hat, eta) for x_hat in x_hats])
                    continue
                moved = []
                for p, x_hat in zip(params, x_hats, strict=True):
                    x = p.to(x_hat.dtype)
                    moved.append(x - 2 / (j + 1) * (eta * loss_gradient(p, group) + x - x_hat))
                self._write_played(group, params, moved)
        evaluate()
        if not self._accepts(moving):
            return False
        for group, params in active:
            for p in params:
                self.state[p]["guess"].copy_(loss_gradient(p, group))
        return True

    def _learn(self, group: dict[str, Any], params: list[Tensor]) -> Tensor:
        """x-hat, and the parameters at it; returns the next step size."""
        shared = next((self.state[p] for p in group["params"] if self.state.get(p)), None)
        for p in params:
            state, dtype = self.state[p], state_dtype(p)
            if not state:
                state.update(x_hat=p.detach().to(dtype, copy=True), guess=torch.zeros_like(p, dtype=dtype))
                for name in ("variation", "max_square"):
                    state[name] = torch.zeros((), dtype=dtype, device=p.device)
            if shared is not None:
                state.update(variation=shared["variation"], max_square=shared["max_square"])
            shared = state if shared is None else shared
        states = [self.state[p] for p in params]
        variation, largest = states[0]["variation"], states[0]["max_square"]
        gradients = [loss_gradient(p, group) for p in params]
        square = torch.stack([g.square().sum().to(variation.device) for g in gradients]).sum()
        if group["grad_bound"] is not None:
            square = torch.full_like(square, group["grad_bound"] ** 2)
        eta = self._step_size(group, torch.where(largest > 0, largest, square), variation)
        errors = [(g - s["guess"]).square().sum() for g, s in zip(gradients, states, strict=True)]
        variation.add_(torch.stack([e.to(variation.device) for e in errors]).sum())
        torch.maximum(largest, square, out=largest)
        x_hats = [s["x_hat"] - eta * g for s, g in zip(states, gradients, strict=True)]
        x_hats = apply_constraint(self._constraint, x_hats, fixed=left_out(group, params))
        for state, x in zip(states, x_hats, strict=True):
            state["x_hat"].copy_(x)
        self._write_played(group, params, x_hats)
        return self._step_size(group, largest, variation)

    @staticmethod
    def _step_size(group: dict[str, Any], bound: Tensor, variation: Tensor) -> Tensor:
        under = 4 * bound + variation
        return torch.where(under > 0, group["lr"] * under.rsqrt(), 0.0)

    def _write_played(self, group: dict[str, Any], params: list[Tensor], points: list[Tensor]) -> None:
        points = apply_constraint(self._constraint, points, fixed=left_out(group, params))
        for p, x in zip(params, points, strict=True):
            p.copy_(x)


def prox_absolute(x: Tensor, a: Tensor, b: Tensor | float, eta: Tensor | float) -> Tensor:
    """Minimiser of ``|a . u - b| + ||u - x||^2 / (2 eta)``: a step along ``a`` that stops where the residual is 0.

    Args:
        x: (d,).
        a: (d,).
        b: scalar.
        eta: > 0.
    """
    residual = a @ x - b
    c = (residual / (eta * (a @ a)).clamp(min=1e-30)).clamp(-1, 1)
    return x - eta * c * a


def prox_hinge(x: Tensor, a: Tensor, y: Tensor | float, eta: Tensor | float) -> Tensor:
    """Minimiser of ``max(0, 1 - y a . u) + ||u - x||^2 / (2 eta)`` (the passive-aggressive step, PA-I).

    Args:
        x: (d,).
        a: (d,).
        y: -1 or 1.
        eta: > 0.
    """
    slack = 1 - y * (a @ x)
    c = (slack / (eta * (a @ a)).clamp(min=1e-30)).clamp(0, 1)
    return x + eta * c * y * a
