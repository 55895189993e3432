"""How good importance weights are."""

import math

import torch
from torch import Tensor


def effective_sample_size(log_w: Tensor) -> Tensor:
    """``(sum w)^2 / sum w^2``, in [1, n].

    Args:
        log_w: log-weights ``(n, ...)``.
    """
    return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()


def pareto_k_hat(log_w: Tensor) -> Tensor:
    """Shape of the generalised Pareto distribution of the largest weights (PSIS, arXiv 1507.02646).

    Below 0.5 the weights have a finite variance; above 0.7 what is estimated with them, and the guide that gave them,
    should not be trusted (Yao et al., arXiv 1802.02538). The fit is that of Zhang and Stephens (2009) with the weak
    prior of Vehtari et al.

    Args:
        log_w: log-weights ``(n, ...)``, n >= 25; one answer for each of the further dimensions. The largest
            ``min(n / 5, 3 sqrt(n))`` are the tail.

    Returns:
        ``(...)``; -inf where the weights of the tail differ by less than 1e-4 of the largest: all is well.

    Raises:
        ValueError: fewer than 25 weights.
    """
    n = len(log_w)
    if n < 25:
        raise ValueError(f"log_w must hold at least 25 weights, got {n}")
    size = int(min(n / 5, 3 * math.sqrt(n)))
    largest = (log_w.double() - log_w.max(0).values).sort(0).values[-size - 1 :].exp()
    x = largest[1:] - largest[0]
    equal = x[-1] <= 1e-4  # as far as rounding of their logarithms can tell
    x = torch.where(equal, torch.ones_like(x), x)
    num = 30 + int(math.sqrt(size))
    grid = torch.arange(1, num + 1, dtype=x.dtype, device=x.device).reshape(-1, *(1,) * (x.ndim - 1))
    quartile = x[int(size / 4 + 0.5) - 1].clamp(min=torch.finfo(x.dtype).tiny)
    b = (1 - (num / (grid - 0.5)).sqrt()) / (3 * quartile) + 1 / x[-1]
    k = torch.log1p(-b[:, None] * x).mean(1)
    profile = size * ((-b / k).log() - k - 1)
    weights = 1 / (profile[None] - profile[:, None]).exp().sum(1)
    b = (b * weights).sum(0) / weights.sum(0)
    k = torch.log1p(-b * x).mean(0)
    k = (k * size + 5) / (size + 10)
    return torch.where(equal, -math.inf, k).to(log_w.dtype)
