r"""Optimistic follow the (regularised) leader: the other form of the optimistic update.

Sachs, Hadiji, van Erven, Guzman, "Between Stochastic and Adversarial Online Convex Optimization", NeurIPS 2022, which
introduced the SEA model that :mod:`lit_methods.optim.optimistic.omd` answers by mirror descent.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_methods.optim.constraints import Constraint, apply_constraint
from lit_methods.optim.foundation.groups import check_positive
from lit_methods.optim.foundation.states import state_dtype
from lit_methods.optim.optimistic.base import (
    Hint,
    OnlineOptimizer,
    check_constraint,
    check_optimism,
    left_out,
    loss_gradient,
    start_inside,
)

__all__ = ["OptimisticFTL", "OptimisticFTRL"]


class _Leader(OnlineOptimizer):
    """Constraint, optimism and validation that both leaders share."""

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        constraint: Constraint | Callable[[Tensor], Tensor] | None,
        optimism: Literal["last_gradient", "none"] | Hint,
    ) -> None:
        check_optimism(optimism)
        check_constraint(constraint)
        self._constraint = constraint
        self._optimism = optimism
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_constraint": self._constraint, "_optimism": self._optimism}

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("nu", "strong_convexity"):
            check_positive(**{name: group.get(name)})
        if not 0 <= group["weight_decay"] < float("inf"):
            raise ValueError(f"weight_decay must be >= 0 and finite, got {group['weight_decay']}")
        if not any(p.is_meta for p in group["params"]):
            with torch.no_grad():
                points = [p.to(state_dtype(p)) for p in group["params"]]
                start_inside(group["params"], apply_constraint(self._constraint, points))

    def _guesses(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> list[Tensor] | None:
        if self._optimism == "none":
            return None
        if callable(self._optimism):
            return [loss_gradient(p, group, self._optimism(p)) for p in params]
        return gradients

    def _write_played(self, group: dict[str, Any], params: list[Tensor], points: list[Tensor]) -> None:
        points = apply_constraint(self._constraint, points, fixed=left_out(group, params))
        for p, x in zip(params, points, strict=True):
            p.copy_(x)


class OptimisticFTRL(_Leader):
    r"""Optimistic follow the regularised leader with a step tuned by the variation of the gradients.

    Plays :math:`x_t = \arg\min_X \langle \sum_{s<t} g_s + M_t, x\rangle + \|x - x_1\|^2 / \eta_t`, which is the
    projection of :math:`x_1 - (\eta_t / 2)(\sum_{s<t} g_s + M_t)`, with :math:`\eta_t = lr^2 / (\nu + \sum_{s<t}
    \eta_s \|g_s - M_s\|^2)`. (The paper regularises around the origin; so does this class when the parameters start
    there.)

    State: 12 bytes a parameter (the sum of gradients, the starting point, the guess).

    A start outside of the set is projected, with a warning. Parameters without a gradient stay where they are, and the
    others move in what these leave of a set that all share. A step synchronises once with the host, to see whether the
    gradients are finite: if not, it changes nothing, and the first such step warns.

    Args:
        params: parameters, named parameters or groups.
        lr: the diameter D of the set, >= 0.
        nu: :math:`\nu` > 0, see :meth:`theory_nu`.
        constraint: a set of :mod:`lit_methods.optim.constraints`, or your own orthogonal projection of one tensor.
        optimism: "last_gradient", "none", or a function that is given a parameter and returns its guess.
        weight_decay: L2 coefficient >= 0, part of the loss.
        maximize: ascend.

    Raises:
        ValueError: a hyperparameter out of range, or DTensor parameters.
        RuntimeError: in :meth:`step`, for sparse gradients.
    """

    state_names = (
        "start",
        "sum",
        "guess",
        "weighted",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        nu: float = 1.0,
        *,
        constraint: Constraint | Callable[[Tensor], Tensor] | None = None,
        optimism: Literal["last_gradient", "none"] | Hint = "last_gradient",
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "nu": nu, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, constraint, optimism)

    @staticmethod
    def theory_nu(diameter: float, grad_bound: float, smoothness: float | None = None) -> float:
        """L D^2 + D G with smoothness L; 2 D G for the worst-case bound 3 sqrt(2) D G sqrt(T) + 4 D G without."""
        check_positive(diameter=diameter, grad_bound=grad_bound, smoothness=smoothness)
        if smoothness is None:
            return 2 * diameter * grad_bound
        return smoothness * diameter**2 + diameter * grad_bound

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        shared = next((self.state[p] for p in group["params"] if self.state.get(p)), None)
        for p in params:
            state, dtype = self.state[p], state_dtype(p)
            if not state:
                state.update(start=p.detach().to(dtype, copy=True), sum=torch.zeros_like(p, dtype=dtype))
                state.update(
                    guess=torch.zeros_like(p, dtype=dtype), weighted=torch.zeros((), dtype=dtype, device=p.device)
                )
            if shared is not None:
                state["weighted"] = shared["weighted"]
            shared = state if shared is None else shared
        if group["lr"] == 0:
            return
        states = [self.state[p] for p in params]
        gradients = [loss_gradient(p, group) for p in params]
        weighted = states[0]["weighted"]
        eta = group["lr"] ** 2 / (group["nu"] + weighted)
        errors = [(g - s["guess"]).square().sum() for g, s in zip(gradients, states, strict=True)]
        weighted.add_(eta * torch.stack([e.to(weighted.device) for e in errors]).sum())
        eta = group["lr"] ** 2 / (group["nu"] + weighted)
        guesses = self._guesses(group, params, gradients)
        points = []
        for i, (state, g) in enumerate(zip(states, gradients, strict=True)):
            state["sum"].add_(g)
            total = state["sum"]
            if guesses is not None:
                state["guess"].copy_(guesses[i])
                total = total + guesses[i]
            points.append(state["start"] - 0.5 * eta.to(g.device) * total)
        self._write_played(group, params, points)


class OptimisticFTL(_Leader):
    r"""Optimistic follow the leader, for :math:`\mu`-strongly convex losses.

    Plays the minimiser over X of :math:`\sum_{s<t} [\langle g_s, x\rangle + (\mu/2)\|x - x_s\|^2] + \langle M_t,
    x\rangle`, the projection of :math:`(\sum_{s<t} x_s - lr\,(\sum_{s<t} g_s + M_t) / \mu) / (t - 1)`.

    State: 8 bytes a parameter.

    A start outside of the set is projected, with a warning. Parameters without a gradient stay where they are, and the
    others move in what these leave of a set that all share. A step synchronises once with the host, to see whether the
    gradients are finite: if not, it changes nothing, and the first such step warns.

    Args:
        params: parameters, named parameters or groups.
        lr: factor of the gradients, >= 0; 1 in the paper.
        strong_convexity: :math:`\mu` > 0.
        constraint: a set of :mod:`lit_methods.optim.constraints`, or your own orthogonal projection of one tensor.
        optimism: "last_gradient", "none", or a function that is given a parameter and returns its guess.
        weight_decay: L2 coefficient >= 0, part of the loss.
        maximize: ascend.

    Raises:
        ValueError: a hyperparameter out of range, or DTensor parameters.
        RuntimeError: in :meth:`step`, for sparse gradients.
    """

    state_names = (
        "points",
        "sum",
        "rounds",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        strong_convexity: float = 1.0,
        *,
        constraint: Constraint | Callable[[Tensor], Tensor] | None = None,
        optimism: Literal["last_gradient", "none"] | Hint = "last_gradient",
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "strong_convexity": strong_convexity, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, constraint, optimism)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                zeros = torch.zeros_like(p, dtype=state_dtype(p))
                self.state[p].update(points=zeros, sum=zeros.clone(), rounds=0)
        if group["lr"] == 0:
            return
        gradients = [loss_gradient(p, group) for p in params]
        guesses = self._guesses(group, params, gradients)
        played = []
        for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
            state = self.state[p]
            state["rounds"] += 1
            state["points"].add_(p)
            state["sum"].add_(g)
            total = state["sum"] if guesses is None else state["sum"] + guesses[i]
            scale = group["lr"] / group["strong_convexity"]
            played.append((state["points"] - scale * total) / state["rounds"])
        self._write_played(group, params, played)
