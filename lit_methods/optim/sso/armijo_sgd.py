"""SGD with a stochastic Armijo line search on the mini-batch's loss.

Vaswani, Mishkin, Laradji, Schmidt, Gidel, Lacoste-Julien, "Painless Stochastic Gradient: Interpolation, Line-Search,
and Convergence Rates", NeurIPS 2019, arXiv 1905.09997 ("SLS"): the baseline in parameter space that SSO is compared
with.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lit_methods.optim.foundation.closures import RepeatedClosure
from lit_methods.optim.foundation.finite import warn_of_skipped_step
from lit_methods.optim.foundation.groups import (
    check_at_least,
    check_factor,
    check_nonnegative,
    check_own_state,
    check_real,
    check_share,
    check_shared,
)
from lit_methods.optim.foundation.ranks import mean_over_ranks
from lit_methods.optim.sso.surrogate import inner_product

__all__ = ["ArmijoSGD"]


class ArmijoSGD(Optimizer):
    """Gradient descent on each mini-batch with the longest step of a backtracking search that Armijo's rule accepts.

    The search starts at ``grow`` times the last accepted step, at most at ``lr``, and multiplies by ``decay`` until
    loss(p - αg) <= loss(p) - c α |g|². One step costs one gradient and one loss evaluation for each trial. Host
    synchronisations on CUDA: one for |g|² and one for each trial. With several ranks (DDP) losses are averaged, so all
    take the same step. A loss or gradient that is not finite skips the step, and the first such step warns. When no
    trial is accepted the parameters stay where they are and the next search starts at the last trial.

    Args:
        params: parameters, named parameters or groups; groups share all settings, except that ``lr=0`` freezes a group.
        lr: greatest step, >= 0.
        c: demanded share of the linear decrease, in (0, 1).
        decay: factor after a rejected trial, in (0, 1).
        grow: factor before each step, >= 1. The authors take 2^(1/batches per epoch) (recalled, not verified).
        max_trials: trials of a step, >= 1.
        process_group: the data-parallel ranks; None for all. Copies and unpickled instances use all.

    Raises:
        ValueError: an argument out of range, or groups that differ.
        RuntimeError: in :meth:`step`: no closure; sparse gradients.
    """

    gradients_cleared = False
    state: dict[Any, Any]  # type: ignore[assignment]  # the accepted step is no one parameter's: key "armijo"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        c: float = 0.1,
        decay: float = 0.7,
        grow: float = 1.1,
        max_trials: int = 100,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_share(c=c, decay=decay)
        check_factor(grow=grow)
        check_at_least(1, max_trials=max_trials)
        self._group = process_group
        super().__init__(params, {"lr": lr, "c": c, "decay": decay, "grow": grow, "max_trials": max_trials})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it shares every setting but ``lr=0`` with the others."""
        check_shared(param_group, self.defaults, ("c", "decay", "grow", "max_trials"))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_nonnegative(lr=group["lr"])
            check_real(group["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.gradients_cleared = True
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state."""
        check_own_state(self, state_dict, {"step_size"})
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_group", None)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None, evaluate: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """Take one step.

        Args:
            closure: computes the loss of the batch, calls backward and returns the loss.
            evaluate: computes the loss of the same batch, called without gradients for each trial; None: the closure is
                called again, which costs a backward pass for each trial.

        Returns:
            The loss before the step.
        """
        greatest = max(float(group["lr"]) for group in self.param_groups)
        if closure is None:
            if greatest == 0:
                return None
            raise RuntimeError("ArmijoSGD evaluates the loss more than once: call step(closure)")
        again = RepeatedClosure(self, closure)
        loss = again()
        active = [p for g in self.param_groups if g["lr"] for p in g["params"] if p.grad is not None]
        if loss is None or not active:
            return loss
        grads = [p.grad.clone() for p in active if p.grad is not None]
        if any(g.layout is not torch.strided for g in grads):
            raise RuntimeError(
                "ArmijoSGD needs dense gradients, not sparse ones; build the embedding with sparse=False"
            )
        value, slope = self._mean(loss), inner_product(grads, grads)
        if not (math.isfinite(value) and math.isfinite(slope)):
            warn_of_skipped_step(self)
            return loss
        group, state = self.param_groups[0], self.state.setdefault("armijo", {})
        step_size = min(group["grow"] * state.get("step_size", greatest), greatest)
        start = [p.clone() for p in active]
        for trial in range(group["max_trials"]):
            step_size *= group["decay"] if trial else 1.0
            torch._foreach_copy_(active, start)
            torch._foreach_add_(active, grads, alpha=-step_size)
            new = self._mean(again() if evaluate is None else evaluate())
            if new <= value - group["c"] * step_size * slope:
                break
        else:
            torch._foreach_copy_(active, start)
        state["step_size"] = step_size
        return loss

    def _mean(self, loss: Tensor) -> float:
        return float(mean_over_ranks([loss.detach().double()], self._group)[0])
