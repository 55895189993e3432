"""The convex losses of online learning on ``x`` (dim,), and their exact offline optimum over a ball."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

OnlineLoss = Literal["linear", "quadratic", "least_squares", "logistic", "hinge", "abs"]
LOSSES = ("linear", "quadratic", "least_squares", "logistic", "hinge", "abs")


def sample_losses(loss: OnlineLoss, x: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    """Loss of every sample, ``(...,)``, for ``x`` (dim,) or one point per sample, ``(..., dim)``.

    Args:
        loss: one of ``LOSSES``.
        x: the point or points.
        features: ``(..., dim)``; see :class:`lit_methods.batches.OnlineRound`.
        targets: ``(...,)``.
    """
    if loss == "quadratic":
        return 0.5 * (x - features).square().sum(-1)
    scores = (features * x).sum(-1)
    if loss == "linear":
        return scores
    if loss == "least_squares":
        return 0.5 * (scores - targets).square()
    if loss == "logistic":
        return softplus(-targets * scores)
    if loss == "hinge":
        return (1 - targets * scores).clamp(min=0)
    return (scores - targets).abs()


def sample_gradients(loss: OnlineLoss, x: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    """Gradients (subgradients at kinks) of :func:`sample_losses`, ``(..., dim)``."""
    if loss == "linear":
        return features
    if loss == "quadratic":
        return x - features
    scores = (features * x).sum(-1)
    if loss == "least_squares":
        slopes = scores - targets
    elif loss == "logistic":
        slopes = -targets * torch.sigmoid(-targets * scores)
    elif loss == "hinge":
        slopes = torch.where(targets * scores < 1, -targets, torch.zeros_like(targets))
    else:
        slopes = (scores - targets).sign()
    return slopes[..., None] * features


def minimize_quadratic(matrix: Tensor, vector: Tensor, radius: float) -> Tensor:
    """Minimiser of ``u' matrix u / 2 - vector' u`` over ``||u||_2 <= radius``, to rounding error.

    Args:
        matrix: symmetric, positive semi-definite, ``(dim, dim)``.
        vector: ``(dim,)``.
        radius: > 0, may be ``inf`` (then the smallest of all minimisers).
    """
    weights, basis = torch.linalg.eigh(matrix.double())
    b = basis.T @ vector.double()
    floor = weights.abs().amax() * len(b) * torch.finfo(torch.float64).eps

    def at(nu: float) -> Tensor:
        shifted = weights.clamp(min=0) + nu
        return torch.where(shifted > floor, b / shifted.clamp(min=1e-300), 0.0)

    if float(at(0.0).norm()) <= radius:
        return basis @ at(0.0)
    low, high = 0.0, float(b.norm()) / radius
    nu = 0.5 * high
    for _ in range(200):  # Newton on 1 / norm between bounds
        u = at(nu)
        norm = float(u.norm())
        low, high = (nu, high) if norm > radius else (low, nu)
        slope = float((u.square() / (weights.clamp(min=0) + nu)).sum())
        following = nu + norm**2 / slope * (norm / radius - 1)
        following = following if low < following < high else 0.5 * (low + high)
        if abs(following - nu) <= 1e-16 * nu or following in (low, high):
            break
        nu = following
    return basis @ at(high)


def minimize_sum(loss: OnlineLoss, features: Tensor, targets: Tensor, weights: Tensor, radius: float) -> Tensor:
    """Minimiser of a weighted sum of ``logistic``, ``hinge`` or ``abs`` losses over ``||u||_2 <= radius``.

    Newton's method whose quadratic model is minimised over the ball exactly. ``hinge`` and ``abs`` are smoothed with a
    width that shrinks to 1e-9, which leaves an error below 1e-9 times the sum of the weights.

    Args:
        loss: "logistic", "hinge" or "abs".
        features: ``(samples, dim)``.
        targets: ``(samples,)``.
        weights: ``(samples,)``.
        radius: > 0, may be ``inf``.
    """
    a, y, w = features.double(), targets.double(), weights.double()
    u = torch.zeros(a.shape[1], dtype=torch.float64, device=a.device)
    widths = [1.0] if loss == "logistic" else [0.3**k for k in range(18)] + [1e-9]
    for width in widths:
        for _ in range(100):
            value, slopes, curvatures = _smoothed(loss, a @ u, y, width)
            gradient = a.T @ (w * slopes)
            hessian = (a * (w * curvatures)[:, None]).T @ a
            hessian += torch.eye(len(u), dtype=u.dtype, device=u.device) * 1e-12 * (1 + hessian.diagonal().amax())
            direction = minimize_quadratic(hessian, hessian @ u - gradient, radius) - u
            decrease = float(gradient @ direction)
            if decrease > -1e-13 * max(1.0, float(w @ value)):
                break
            step = 1.0
            while step > 1e-10:
                trial = float(w @ _smoothed(loss, a @ (u + step * direction), y, width)[0])
                if trial <= float(w @ value) + 1e-4 * step * decrease:
                    break
                step *= 0.5
            u = u + step * direction
    return u


def _smoothed(loss: OnlineLoss, scores: Tensor, targets: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """Value, first and second derivative in the score; ``|r|`` becomes ``sqrt(r^2 + width^2)``."""
    if loss == "logistic":
        p = torch.sigmoid(-targets * scores)
        return softplus(-targets * scores), -targets * p, targets.square() * p * (1 - p)
    residual = scores - targets if loss == "abs" else 1 - targets * scores
    root = (residual.square() + width**2).sqrt()
    if loss == "abs":
        return root, residual / root, width**2 / root**3
    return 0.5 * (residual + root), -0.5 * targets * (1 + residual / root), 0.5 * (targets * width).square() / root**3
