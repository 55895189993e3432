"""What the sign-preserving optimizers share: strict groups, weights in at least float32, momentum, the mirror step."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lit_methods.optim.foundation.finite import warn_of_skipped_step
from lit_methods.optim.foundation.flat import is_dtensor, local_grad, local_tensor
from lit_methods.optim.foundation.groups import (
    check_choice,
    check_gradients,
    check_lr,
    check_nonnegative,
    check_positive,
    check_real,
)
from lit_methods.optim.foundation.states import load_unrounded_state, state_dtype

ON_ZERO = ("warn", "raise", "ignore")


class SignedOptimizer(Optimizer):
    """An optimizer of weights and their signs; abstract.

    Subclasses define :meth:`_check_group` and :meth:`_step_group`. Parameters of less than 32 bits keep a float32 copy
    in the state: a factor such as exp(-6e-4) rounds to 1 in bfloat16, so that the weight itself would never move.
    """

    state_names: tuple[str, ...]  # what the state of a parameter may hold, beside the copy

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own values of the settings are validated like the constructor's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_lr(group["lr"])
            check_nonnegative(weight_decay=group["weight_decay"])
            check_real(group["params"])
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters without a gradient stay.

        Args:
            closure: computes the loss, calls backward and returns the loss; called once.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for group, params in zip(self.param_groups, moving, strict=True):
            check_gradients(params, type(self).__name__)
            bad = _not_finite(group, params) if group["skip_nonfinite"] else None
            if bad is not None:
                warn_of_skipped_step(self, f"the gradient of {bad} is not finite; lower lr or clip the gradients")
                return loss
        for group, params in zip(self.param_groups, moving, strict=True):
            if not params:
                continue
            weights = [self._wide_weight(p) for p in params]
            grads = [p.grad.to(w.dtype) for p, w in zip(params, weights, strict=True) if p.grad is not None]
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            self._step_group(group, params, weights, grads)
            for p, weight in zip(params, weights, strict=True):
                if weight is not p:
                    p.copy_(weight)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; float32 copies and averages of narrower parameters stay float32."""
        load_unrounded_state(self, state_dict, {"weight", *self.state_names})

    def _wide_weight(self, p: Tensor) -> Tensor:
        """The parameter, or its float32 copy; what was written into the parameter from outside wins."""
        if p.dtype == state_dtype(p):
            return p
        state = self.state[p]
        if "weight" not in state:
            state["weight"] = p.detach().float()
        else:
            state["weight"] = torch.where(state["weight"].to(p.dtype) == p, state["weight"], p.float())
        return state["weight"]

    def _check_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _step_group(
        self, group: dict[str, Any], params: list[Tensor], weights: list[Tensor], grads: list[Tensor]
    ) -> None:
        """Move ``weights`` in place; ``params`` are the keys of the state."""
        raise NotImplementedError


def check_exponentiated(group: dict[str, Any], name: str) -> None:
    """Check what the groups of the exponentiated optimizers have in common."""
    check_choice("algorithm", group["algorithm"], ("eg", "gd"))
    check_choice("on_zero", group["on_zero"], ON_ZERO)
    check_nonnegative(hypentropy=group["hypentropy"])
    check_positive(max_log_step=group["max_log_step"])
    if group["algorithm"] == "eg" and group["hypentropy"] == 0:
        check_zeros(group, name)


def check_zeros(group: dict[str, Any], name: str) -> None:
    """Say which parameters hold zeros, which a multiplicative step never moves."""
    if group["on_zero"] == "ignore":
        return
    for label, p in _labelled(group, group["params"]):
        zeros = 0 if p.is_meta else int((local_tensor(p.detach()) == 0).sum())
        if zeros:
            message = (
                f"{label} holds {zeros} zeros, which {name} never moves: build the groups by eg_param_groups(model), "
                "draw the weights by lognormal_, or set hypentropy > 0 or on_zero='ignore'"
            )
            if group["on_zero"] == "raise":
                raise ValueError(f"on_zero is {group['on_zero']!r}: {message}")
            warnings.warn(message, stacklevel=5)


def with_momentum(state: dict[Any, Any], group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Any]:
    """The directions of SGD with momentum; as in ``torch.optim.SGD`` the first buffer is the gradient itself."""
    momentum = group["momentum"]
    if momentum == 0:
        return grads
    pairs = zip(params, grads, strict=True)
    former = [(state[p]["momentum_buffer"], g) for p, g in pairs if "momentum_buffer" in state[p]]
    if former:
        averages, news = zip(*former, strict=True)
        torch._foreach_mul_(averages, momentum)
        torch._foreach_add_(averages, news, alpha=1 - group["dampening"])
    for p, g in zip(params, grads, strict=True):
        if "momentum_buffer" not in state[p]:
            state[p]["momentum_buffer"] = g.clone()
    buffers = [state[p]["momentum_buffer"] for p in params]
    return list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else buffers


def check_momentum(group: dict[str, Any]) -> None:
    """Check the settings of SGD with momentum."""
    momentum, dampening = group["momentum"], group["dampening"]
    check_nonnegative(momentum=momentum)
    if not math.isfinite(dampening):
        raise ValueError(f"dampening must be finite, got {dampening}")
    if group["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"nesterov must be False unless momentum > 0 and dampening = 0, got True with momentum={momentum} and "
            f"dampening={dampening}"
        )


def smooth_signs(weights: list[Tensor], hypentropy: float) -> list[Tensor]:
    """``w / sqrt(w^2 + b^2)``: the sign of the weight for b = 0, and what decays it by a factor otherwise."""
    if hypentropy == 0:
        return list(torch._foreach_sign(weights))
    return [w / (w.square() + hypentropy**2).sqrt() for w in weights]


def mirror_step(weights: list[Tensor], steps: list[Tensor], group: dict[str, Any]) -> None:
    """``w <- b sinh(asinh(w / b) + step)`` in place; for b = 0 its limit ``w exp(sign(w) step)``.

    Args:
        weights: to move.
        steps: how far to go in the mirror coordinates; overwritten.
        group: b is its ``hypentropy``, and ``max_log_step`` bounds the steps.
    """
    bound, b = group["max_log_step"], group["hypentropy"]
    if bound is not None:
        torch._foreach_clamp_min_(steps, -bound)
        torch._foreach_clamp_max_(steps, bound)
    shifts = None
    if b > 0:  # b sinh(asinh(w/b) + s) = w exp(sign(w) s) + (sqrt(w^2 + b^2) - |w|) sinh(s), without cancellation
        shifts = [b**2 / ((w.square() + b**2).sqrt() + w.abs()) * s.sinh() for w, s in zip(weights, steps, strict=True)]
    torch._foreach_mul_(steps, torch._foreach_sign(weights))
    torch._foreach_exp_(steps)
    torch._foreach_mul_(weights, steps)
    if shifts is not None:
        torch._foreach_add_(weights, shifts)


def _not_finite(group: dict[str, Any], params: list[Tensor]) -> str | None:
    """The first parameter whose gradient is not finite: an infinite one would make a weight 0, for ever."""
    if not params:
        return None
    grads = [local_grad(p) for p in params]
    norms = torch._foreach_norm(grads)  # one pass; overflows to infinity before the gradients do, so look again
    if not _over_shards(norms, params).isfinite().all():
        bad = _over_shards([(~g.isfinite()).any() for g in grads], params)
        if bad.any():
            return _labelled(group, params)[int(bad.argmax())][0]
    return None


def _labelled(group: dict[str, Any], params: list[Tensor]) -> list[tuple[str, Tensor]]:
    """Parameters with their names, or else their numbers in the group."""
    number = {id(p): i for i, p in enumerate(group["params"])}
    names = group.get("param_names")
    label = (lambda i: names[i]) if names else (lambda i: f"parameter {i} of its group")
    return [(label(number[id(p)]), p) for p in params]


def _over_shards(values: Sequence[Tensor], params: list[Any]) -> Tensor:
    """For each parameter the largest value of all ranks that hold a shard of it, so that they decide alike."""
    result = [value.to(values[0].device, torch.float32) for value in values]
    for i, p in enumerate(params):
        if is_dtensor(p):
            from torch.distributed.tensor import DTensor, Partial, Replicate

            placements = [Replicate() if placement.is_replicate() else Partial("max") for placement in p.placements]
            result[i] = DTensor.from_local(result[i], p.device_mesh, placements).full_tensor()
    return torch.stack(result)
