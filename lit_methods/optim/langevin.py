"""The gradient method that the illustrations of consensus-based optimization compare with (arXiv 2306.09778)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lit_methods.optim.foundation.finite import gradients_are_finite, warn_of_skipped_step
from lit_methods.optim.foundation.groups import check_gradients, check_lr, check_nonnegative, check_own_state

__all__ = ["AnnealedLangevin"]


class AnnealedLangevin(Optimizer):
    r"""Gradient descent with noise that dies down: :math:`x \leftarrow x - lr\,\nabla E + \sigma_k \sqrt{lr}\, B_k`.

    At a parameter's k-th step :math:`\sigma_k = \sigma / \log(k + 1)` and :math:`B_k` is standard normal. It crosses
    barriers where plain descent stops at the first local minimum, slowly: on smooth losses prefer plain descent.

    Cost: one normal draw for each parameter element, no memory beyond it, one host synchronisation a step, to see
    whether the gradients are finite: if not, the step changes nothing, and the first such step warns. The noise is a
    function of ``seed`` and the number of steps, so that ranks that average their gradients stay identical.

    Args:
        params: as for any optimizer.
        lr: time step, >= 0.
        sigma: strength of the noise at first, >= 0.
        seed: of the noise, >= 0.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a gradient is complex or sparse.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, sigma: float = 10.0, seed: int = 0) -> None:
        super().__init__(params, {"lr": lr, "sigma": sigma, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_lr(group["lr"])
            check_nonnegative(sigma=group["sigma"], seed=group["seed"])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        check_gradients(params, type(self).__name__)
        if not gradients_are_finite(params):
            warn_of_skipped_step(self)
            return loss
        for number, group in enumerate(self.param_groups):
            moving: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            spreads = []
            for p in moving:
                step = self.state[p]["step"] = self.state[p].get("step", 0) + 1
                spreads.append(group["sigma"] / math.log(step + 1) * group["lr"] ** 0.5)
            if not moving:
                continue
            latest = max(self.state[p]["step"] for p in moving)
            noise = _normal(moving, hash((group["seed"], number, latest)) % 2**63)
            torch._foreach_mul_(noise, spreads)
            torch._foreach_add_(moving, [p.grad for p in moving if p.grad is not None], alpha=-group["lr"])
            torch._foreach_add_(moving, noise)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state."""
        check_own_state(self, state_dict, {"step"})
        super().load_state_dict(state_dict)


def _normal(like: list[Tensor], seed: int) -> list[Tensor]:
    """Standard normal tensors of the same shapes, in one draw."""
    first = like[0]
    generator = torch.Generator(first.device).manual_seed(seed)
    sizes = [p.numel() for p in like]
    draw = torch.randn(sum(sizes), generator=generator, device=first.device, dtype=first.dtype)
    return [part.view_as(p) for p, part in zip(like, draw.split(sizes), strict=True)]
