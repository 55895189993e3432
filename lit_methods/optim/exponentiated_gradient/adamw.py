"""AdamW whose step is a factor; the authors' ``AdamWEG`` (see :mod:`.gradient` for the paper)."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_methods.optim.exponentiated_gradient.base import SignedOptimizer, check_exponentiated, mirror_step
from lit_methods.optim.foundation.groups import check_nonnegative


class AdamWExponentiated(SignedOptimizer):
    r"""AdamW's direction in log space: :math:`w \leftarrow (1 - lr\,wd)\,w\,e^{-lr\,sign(w)\,d}`.

    Here :math:`d = \hat m / (\sqrt{\hat v} + eps)` is AdamW's direction, from the averages of gradients and squares.
    Use it as :class:`ExponentiatedGradient` where gradients differ much in scale. A step changes ``log |w|`` by about
    ``lr`` whatever the gradient; 0.1 was used where EG with momentum took 0.5 to 1. Signs never change.

    Example:
        >>> import torch
        >>> from lit_methods.optim import eg_param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1))
        >>> optimizer = AdamWExponentiated(eg_param_groups(model, gd_lr=1e-3), lr=0.05)

    Cost: state of 8 bytes a float32 weight (12 with ``amsgrad``), 4 more for weights of less than 32 bits. One host
    synchronisation per group on CUDA with ``skip_nonfinite``, none without (not yet run on CUDA). Ranks (DDP) take
    the same step from averaged gradients; works elementwise on DTensors.

    Args:
        params: parameters, named parameters or groups, whose settings may differ.
        lr: step in log space, >= 0, with ``lr * weight_decay < 1``; a number or a scalar tensor.
        betas: decay of the averages of gradients and their squares, in [0, 1).
        eps: added to the root of the average square, >= 0.
        weight_decay: decoupled decay, >= 0: a factor ``1 - lr * weight_decay`` a step.
        amsgrad: divide by the largest average square so far.
        max_log_step: bound of the change of ``log |w|`` by the gradient in one step, > 0; None: no bound.
        hypentropy: scale b >= 0 below which steps become additive: ``w = b sinh(asinh(w / b) - step)``. 0 is EG. With
            b > 0 weights leave zero and may cross it, so that the sign, and with it Dale's law, is given up, as is the
            log-normal shape below b.
        algorithm: "eg", or "gd" for AdamW itself, the way to treat biases and gains in a group.
        on_zero: what to do about zeros in the parameters of an "eg" group: "warn", "raise" or "ignore".
        maximize: ascend instead of descend.
        skip_nonfinite: skip steps whose gradients hold NaN or infinities, with one warning.

    Raises:
        ValueError: an argument out of range; with ``on_zero="raise"``, a parameter that holds zeros.
        RuntimeError: in :meth:`step`: a gradient is sparse.
    """

    state_names = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        max_log_step: float | None = None,
        hypentropy: float = 0.0,
        algorithm: Literal["eg", "gd"] = "eg",
        on_zero: Literal["warn", "raise", "ignore"] = "warn",
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "max_log_step": max_log_step,
            "hypentropy": hypentropy,
            "algorithm": algorithm,
            "on_zero": on_zero,
            "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        for beta in group["betas"]:
            if not 0 <= beta < 1:
                raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
        check_nonnegative(eps=group["eps"])
        if not lr * decay < 1:
            raise ValueError(f"weight_decay must be < 1 / lr, or decay would flip signs, got {decay} with lr={lr}")
        check_exponentiated(group, type(self).__name__)

    def _step_group(
        self, group: dict[str, Any], params: list[Tensor], weights: list[Tensor], grads: list[Tensor]
    ) -> None:
        states = [self.state[p] for p in params]
        for state, weight in zip(states, weights, strict=True):
            if "step" not in state:
                state["step"] = 0
                names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
                state.update({name: torch.zeros_like(weight) for name in names})
            state["step"] += 1
        first, second = group["betas"]
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(means, grads, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - second)
        if group["amsgrad"]:
            largest = [s["max_exp_avg_sq"] for s in states]
            torch._foreach_maximum_(largest, squares)
            squares = largest
        roots = [(1 - second ** s["step"]) ** 0.5 for s in states]  # of the bias corrections
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, [group["eps"] * root for root in roots])
        steps = list(torch._foreach_div(means, denominators))
        factors = [-root / (1 - first ** s["step"]) for root, s in zip(roots, states, strict=True)]
        torch._foreach_mul_(steps, [group["lr"] * factor for factor in factors])
        if group["algorithm"] == "eg":
            mirror_step(weights, steps, group)
        else:
            torch._foreach_add_(weights, steps)
