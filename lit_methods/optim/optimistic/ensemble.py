r"""Optimistic gradient descent at many step sizes at once, for dynamic regret (collaborative Sword++).

Chen, Tu, Zhao, Zhang, JMLR 25(178), 2024 (arXiv 2302.04552), section on dynamic regret, on the two-layer method of
Zhao, Zhang, Zhang, Zhou ("Sword++", JMLR 2024). Against any sequence of comparators of path length P the expected
regret is :math:`O(P + \sqrt{1 + P}(\sqrt{\sigma^2_{1:T}} + \sqrt{\Sigma^2_{1:T}}))`, without knowing P. The order of
the operations is that of the NumPy library PyNOL, whose trajectory it reproduces.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_methods.optim.constraints import Constraint, apply_constraint
from lit_methods.optim.foundation.groups import check_nonnegative, check_positive
from lit_methods.optim.foundation.states import state_dtype
from lit_methods.optim.optimistic.base import (
    OnlineOptimizer,
    check_constraint,
    left_out,
    loss_gradient,
    start_inside,
)

__all__ = ["OptimisticEnsemble"]


class OptimisticEnsemble(OnlineOptimizer):
    r"""N learners with doubling step sizes, combined by an optimistic Hedge; one gradient a round.

    Base learner i plays :math:`x_{t,i} = \Pi[\hat x_{t,i} - \eta_i M_t]` and
    :math:`\hat x_{t+1,i} = \Pi[\hat x_{t,i} - \eta_i g_t]`, with :math:`M_{t+1} = g_t` the gradient at the *combined*
    point :math:`x_t = \sum_i p_{t,i} x_{t,i}`, which the parameters hold. With the stability term :math:`s_{t,i} =
    \lambda \|x_{t,i} - x_{t-1,i}\|^2`, the meta learner expects the loss :math:`m_{t,i} = \langle M_t, x_{t,i}\rangle
    + s_{t,i}` and sees :math:`\ell_{t,i} = \langle g_t, x_{t,i}\rangle + s_{t,i}`: :math:`p_t \propto \hat p_t
    e^{-\epsilon_t m_t}` and :math:`\hat p_{t+1} \propto \hat p_t e^{-\epsilon_t \ell_t}` (``meta="greedy"``), or
    :math:`p_t \propto e^{-\epsilon_t (\sum_{s<t} \ell_s + m_t)}` (``meta="lazy"``), with :math:`\epsilon_{t+1} =
    \min\{1/(8 D^2 L), (1 + \sum_{s \le t} \|\ell_s - m_s\|_\infty^2)^{-1/2}\}`.

    All parameters of a group are one point. State: 2 N float32 numbers a parameter. Parameters without a gradient stay
    where they are, and the others move in what these leave of a set that all share. A start outside of the set is
    projected, with a warning. A step synchronises once with the host, to see whether the gradients are finite: if not,
    it changes nothing, and the first such step warns.

    Args:
        params: parameters, named parameters or groups.
        lr: factor of all step sizes, >= 0; 1 in the paper.
        diameter: D of the set, > 0.
        grad_bound: G, > 0.
        smoothness: L, > 0.
        horizon: number of rounds T, >= 1.
        step_sizes: the learners' step sizes, > 0; None takes :meth:`step_pool`.
        stability: :math:`\lambda` >= 0; None takes 2 L.
        constraint: a set of :mod:`lit_methods.optim.constraints`, or your own orthogonal projection of one tensor.
        meta: "greedy" or "lazy".
        weight_decay: L2 coefficient >= 0, part of the loss.
        maximize: ascend.

    Raises:
        ValueError: a hyperparameter out of range, or DTensor parameters.
        RuntimeError: in :meth:`step`, for sparse gradients.
    """

    state_names = ("x_hats", "points", "prior", "log_weights", "expected", "moved", "surprise", "steps")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        diameter: float = 1.0,
        grad_bound: float = 1.0,
        smoothness: float = 1.0,
        horizon: int = 1000,
        step_sizes: Sequence[float] | None = None,
        stability: float | None = None,
        constraint: Constraint | Callable[[Tensor], Tensor] | None = None,
        meta: Literal["greedy", "lazy"] = "greedy",
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        check_positive(diameter=diameter, grad_bound=grad_bound, smoothness=smoothness)
        if horizon < 1:
            raise ValueError(f"horizon must be >= 1, got {horizon}")
        if meta not in ("greedy", "lazy"):
            raise ValueError(f"meta must be 'greedy' or 'lazy', got {meta!r}")
        if step_sizes is None:
            step_sizes = self.step_pool(diameter, grad_bound, smoothness, horizon)
        stability = 2 * smoothness if stability is None else stability
        check_constraint(constraint)
        self._constraint = constraint
        self._meta = meta
        super().__init__(
            params,
            {
                "lr": lr,
                "step_sizes": [float(eta) for eta in step_sizes],
                "stability": float(stability),
                "meta_lr": 1 / (8 * diameter**2 * smoothness),
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
        )

    @staticmethod
    def step_pool(diameter: float, grad_bound: float, smoothness: float, horizon: int) -> list[float]:
        """D / (G sqrt(T)), doubled until the first value above 1 / (8 L), which is included."""
        pool = [diameter / (grad_bound * horizon**0.5)]
        while pool[-1] <= 1 / (8 * smoothness):
            pool.append(2 * pool[-1])
        return pool

    @property
    def weights(self) -> list[Tensor]:
        """The learners' weights in the point played now, (N,) for each group that has taken a step."""
        states = [self.state.get(p, {}) for group in self.param_groups for p in group["params"][:1]]
        return [state["log_weights"].exp() for state in states if state]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_constraint": self._constraint, "_meta": self._meta}

    def _check_group(self, group: dict[str, Any]) -> None:
        check_nonnegative(weight_decay=group["weight_decay"], stability=group["stability"])
        step_sizes = group["step_sizes"]
        if not step_sizes or not all(0 < eta < float("inf") for eta in step_sizes):
            raise ValueError(f"step_sizes must hold at least one number, all > 0 and finite, got {step_sizes}")
        if self._constraint is not None and not any(p.is_meta for p in group["params"]):
            with torch.no_grad():
                points = [p.to(state_dtype(p)) for p in group["params"]]
                start_inside(group["params"], apply_constraint(self._constraint, points))

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        first = group["params"][0]
        count = len(group["step_sizes"])
        for p in group["params"]:
            if "x_hats" not in self.state[p]:
                stacked = p.detach().to(state_dtype(p)).expand(count, *p.shape)
                self.state[p].update(x_hats=stacked.clone(), points=stacked.clone())
        meta = self.state[first]
        if "log_weights" not in meta:
            zeros = torch.zeros(count, dtype=meta["x_hats"].dtype, device=first.device)
            meta["prior"] = zeros.clone()  # log p-hat up to a constant (greedy), or minus the sum of losses (lazy)
            meta["log_weights"] = zeros.log_softmax(0)
            meta.update(expected=zeros.clone(), moved=zeros.clone(), surprise=zeros.new_zeros(()))
            meta["steps"] = torch.tensor(group["step_sizes"], dtype=zeros.dtype, device=first.device)
        if group["lr"] == 0:
            return
        states = [self.state[p] for p in params]
        gradients = [loss_gradient(p, group) for p in params]
        rate = (1 + meta["surprise"]).rsqrt().clamp(max=group["meta_lr"])
        losses = _inner(gradients, [s["points"] for s in states]) + meta["moved"]
        meta["prior"].sub_(rate * losses if self._meta == "greedy" else losses)
        meta["prior"].sub_(meta["prior"].amax())
        meta["surprise"].add_((losses - meta["expected"]).abs().amax().square())
        rate = (1 + meta["surprise"]).rsqrt().clamp(max=group["meta_lr"])

        etas = group["lr"] * meta["steps"]
        steps = [etas.to(g).view(-1, *[1] * g.ndim) * g for g in gradients]
        fixed = left_out(group, params)
        x_hats = [s["x_hats"] - d for s, d in zip(states, steps, strict=True)]
        x_hats = apply_constraint(self._constraint, x_hats, 1, fixed=fixed)
        points = [a - d for a, d in zip(x_hats, steps, strict=True)]
        points = apply_constraint(self._constraint, points, 1, fixed=fixed)
        moves = [(x - s["points"]).square().reshape(len(x), -1).sum(1) for x, s in zip(points, states, strict=True)]
        meta["moved"].copy_(group["stability"] * torch.stack(moves).sum(0))
        meta["expected"].copy_(_inner(gradients, points) + meta["moved"])
        prior = meta["prior"] if self._meta == "greedy" else rate * meta["prior"]
        meta["log_weights"].copy_((prior - rate * meta["expected"]).log_softmax(0))
        weights = meta["log_weights"].exp()
        for p, state, a, x in zip(params, states, x_hats, points, strict=True):
            state["x_hats"].copy_(a)
            state["points"].copy_(x)
            p.copy_(torch.tensordot(weights.to(x), x, 1))


def _inner(gradients: Sequence[Tensor], points: Sequence[Tensor]) -> Tensor:
    """<g, x_i> for every learner i, over all parameters."""
    return torch.stack([x.reshape(len(x), -1) @ g.flatten() for g, x in zip(gradients, points, strict=True)]).sum(0)
