"""Gradient descent that stops at zero: what exponentiated gradients are compared with (bioRxiv 2024.10.25.620272)."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_methods.optim.exponentiated_gradient.base import SignedOptimizer, check_momentum, with_momentum

TINY = 1e-18


class SignConstrainedSGD(SignedOptimizer):
    """``torch.optim.SGD``, except that a weight whose step would reach or cross zero becomes 1e-18 of its old sign.

    The baseline of :class:`ExponentiatedGradient`: it keeps Dale's law too, but additively, so that weights are not
    log-normal and many end at the boundary. Weights that are exactly 0 have no sign, and stay. Unlike the authors' code
    (``freeze_gd_signs``), a step that lands exactly on zero keeps the sign too.

    Cost: state of 4 bytes a float32 weight with momentum, none without; 4 more for weights of less than 32 bits. One
    host synchronisation per group on CUDA with ``skip_nonfinite``, none without (not yet run on CUDA). Ranks (DDP)
    take the same step from averaged gradients; works elementwise on DTensors.

    Args:
        params: parameters, named parameters or groups, whose settings may differ.
        lr: step, >= 0; a number or a scalar tensor.
        momentum: factor of the former steps' average, >= 0.
        dampening: the average takes ``1 - dampening`` of the new gradient.
        nesterov: look ahead along the average; needs momentum and no dampening.
        weight_decay: L2 term, >= 0.
        maximize: ascend instead of descend.
        skip_nonfinite: skip steps whose gradients hold NaN or infinities, with one warning.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: in :meth:`step`: a gradient is sparse.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> w.grad = torch.tensor([2.0, 2.0])
        >>> SignConstrainedSGD([w], lr=1.0).step()
        >>> w.tolist()
        [1.000000045813705e-18, -3.0]
    """

    state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_momentum(group)

    def _step_group(
        self, group: dict[str, Any], params: list[Tensor], weights: list[Tensor], grads: list[Tensor]
    ) -> None:
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
        directions = with_momentum(self.state, group, params, grads)
        signs = torch._foreach_sign(weights)
        torch._foreach_add_(weights, torch._foreach_mul(directions, -group["lr"]))
        torch._foreach_mul_(weights, signs)  # negative where zero was crossed, and 0 where there was no sign
        torch._foreach_clamp_min_(weights, TINY)
        torch._foreach_mul_(weights, signs)
