"""Exponentiated gradient descent with momentum.

Cornford, Pogodin, Ghosh, Sheng, Bicknell, Codol, Clark, Lajoie and Richards, *Brain-like learning with exponentiated
gradients*, bioRxiv 2024.10.25.620272; the optimizer of *Dale meets Langevin* (arXiv 2510.02730). Same trace as the
authors' ``SGD(update_alg="eg")``. Beyond the paper: ``max_log_step``, ``hypentropy`` (Ghai, Hazan and Singer,
*Exponentiated Gradient Meets Gradient Descent*, ALT 2020), float32 copies of narrower weights, checks.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_methods.optim.exponentiated_gradient.base import (
    SignedOptimizer,
    check_exponentiated,
    check_momentum,
    mirror_step,
    smooth_signs,
    with_momentum,
)


class ExponentiatedGradient(SignedOptimizer):
    r"""Multiplicative steps that never change the sign of a weight: :math:`w \leftarrow w\,e^{-lr\,sign(w)\,g}`.

    Use it where signs carry a meaning (excitatory and inhibitory weights: Dale's law), where only few of many inputs
    matter, or where weights should end log-normally distributed, sparse and easy to prune. Do not use it on weights
    whose sign must still be found, nor on biases and gains: :func:`eg_param_groups` gives those plain gradient descent.
    It wants a larger ``lr`` than SGD: 0.5 to 1 where SGD takes 0.1.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(8, 2, bias=False)
        >>> signs = layer.weight.detach().sign()
        >>> optimizer = ExponentiatedGradient(layer.parameters(), lr=0.5, momentum=0.9)
        >>> layer(torch.ones(1, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> bool((layer.weight.sign() == signs).all())
        True

    Update: ``g`` is the gradient plus ``weight_decay * sign(w)`` (so decay is a factor ``exp(-lr * weight_decay)``),
    averaged by momentum as in ``torch.optim.SGD``; then the step above. It is mirror descent with the mirror map
    :math:`\sum |w| \log |w| - |w|`, in first order ``w - lr |w| g``. It is the unnormalised EG: rows do not sum to 1.
    Zero is a fixed point: a weight that starts at 0, or that a step of ``lr * |g| > 104`` makes 0 in float32, is dead.

    Cost: state of 4 bytes a float32 weight with momentum, none without; 4 more for weights of less than 32 bits, whose
    float32 copies are what moves. One host synchronisation per group on CUDA with ``skip_nonfinite``, none without
    (not yet run on CUDA). Ranks (DDP) take the same step from averaged gradients; works elementwise on DTensors.

    Args:
        params: parameters, named parameters or groups, whose settings may differ.
        lr: step in log space, >= 0; a number or a scalar tensor.
        momentum: factor of the former steps' average, >= 0.
        dampening: the average takes ``1 - dampening`` of the new gradient.
        nesterov: look ahead along the average; needs momentum and no dampening.
        weight_decay: >= 0. In "gd" groups the usual L2 term.
        max_log_step: bound of ``lr * |g|`` in one step, > 0, applied before ``exp``; None: no bound.
        hypentropy: scale b >= 0 below which steps become additive: ``w = b sinh(asinh(w / b) - lr g)``. 0 is EG. With
            b > 0 weights leave zero and may cross it, so that the sign, and with it Dale's law, is given up, as is the
            log-normal shape below b.
        algorithm: "eg", or "gd" for SGD with the same momentum, the way to treat biases and gains in a group.
        on_zero: what to do about zeros in the parameters of an "eg" group: "warn", "raise" or "ignore".
        maximize: ascend instead of descend.
        skip_nonfinite: skip steps whose gradients hold NaN or infinities, with one warning.

    Raises:
        ValueError: an argument out of range; with ``on_zero="raise"``, a parameter that holds zeros.
        RuntimeError: in :meth:`step`: a gradient is sparse.
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
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "max_log_step": max_log_step,
            "hypentropy": hypentropy,
            "algorithm": algorithm,
            "on_zero": on_zero,
            "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_momentum(group)
        check_exponentiated(group, type(self).__name__)

    def _step_group(
        self, group: dict[str, Any], params: list[Tensor], weights: list[Tensor], grads: list[Tensor]
    ) -> None:
        multiplicative, decay = group["algorithm"] == "eg", group["weight_decay"]
        if decay:
            shrinking = smooth_signs(weights, group["hypentropy"]) if multiplicative else weights
            grads = list(torch._foreach_add(grads, shrinking, alpha=decay))
        directions = with_momentum(self.state, group, params, grads)
        steps = list(torch._foreach_mul(directions, -group["lr"]))
        if multiplicative:
            mirror_step(weights, steps, group)
        else:
            torch._foreach_add_(weights, steps)
