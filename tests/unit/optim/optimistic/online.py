"""Drive an optimizer by given gradients, and paper-shaped NumPy oracles that share no code with it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def play(
    make: Callable[[list[nn.Parameter]], Optimizer],
    start: Tensor,
    gradients: Sequence[Tensor] | Callable[[int, Tensor], Tensor],
    rounds: int | None = None,
) -> tuple[Tensor, Optimizer]:
    """The points played before each round and after the last, ``(rounds + 1, *shape)``."""
    p = nn.Parameter(start.clone())
    optimizer = make([p])
    points = [p.detach().clone()]
    for t in range(len(gradients) if rounds is None else rounds):
        g = gradients(t, p.detach()) if callable(gradients) else gradients[t]
        p.grad = g.to(p.dtype).clone()
        optimizer.step()
        points.append(p.detach().clone())
    return torch.stack(points), optimizer


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ball(x: np.ndarray, radius: float) -> np.ndarray:
    return x * min(1.0, radius / max(np.linalg.norm(x), 1e-300))


def numpy_omd(
    start: np.ndarray,
    gradients: np.ndarray,
    eta: Callable[[int, float], float],
    radius: float = np.inf,
    optimistic: bool = True,
) -> np.ndarray:
    """The two-step algorithm as it stands in the paper; ``eta(t, V_{t-1})``, t from 1."""
    center, guess, variation = start.copy(), np.zeros_like(start), 0.0
    points = [start]
    for t, g in enumerate(gradients, 1):
        step = eta(t, variation)
        variation += float(((g - guess) ** 2).sum())
        center = ball(center - step * g, radius)
        guess = g if optimistic else np.zeros_like(g)
        points.append(ball(center - eta(t + 1, variation) * guess, radius))
    return np.stack(points)
