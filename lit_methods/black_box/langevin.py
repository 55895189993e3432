"""The gradient method that the illustrations of consensus-based optimization compare with."""

import math
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, ParamsT


class AnnealedLangevin(Optimizer):
    r"""Gradient descent with noise that dies down: :math:`x - lr\,\nabla E + \sigma / \log(k + 1)\, \sqrt{lr}\, B`.

    Noise comes from the global generator.

    Args:
        params: as for any optimizer.
        lr: time step, >= 0.
        sigma: strength of the noise at first, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, sigma: float = 10.0) -> None:
        if not (lr >= 0 and sigma >= 0):
            raise ValueError(f"lr and sigma must be >= 0, got {lr} and {sigma}")
        super().__init__(params, {"lr": lr, "sigma": sigma, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            spread = group["sigma"] / math.log(group["steps"] + 1) * group["lr"] ** 0.5
            moving = [p for p in group["params"] if p.grad is not None]
            if moving:
                noise = torch.randn(sum(p.numel() for p in moving), device=moving[0].device, dtype=moving[0].dtype)
                parts = noise.mul_(spread).split([p.numel() for p in moving])
                torch._foreach_add_(moving, [p.grad for p in moving], alpha=-group["lr"])
                torch._foreach_add_(moving, [part.view_as(p) for p, part in zip(moving, parts, strict=True)])
        return loss
