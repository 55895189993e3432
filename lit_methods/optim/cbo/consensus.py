"""The consensus point: a mean of particles weighted by their losses. Leading dimensions are independent runs."""

import math

import torch
from torch import Tensor

_MANY, _BLOCK = 8192, 1024  # from how many particles sums are taken in blocks, and of how many


def consensus_weights(losses: Tensor, alpha: float | Tensor, lowest: Tensor | None = None) -> Tensor:
    """``softmax(-alpha losses)`` over the last dimension; NaN where no loss of a run is finite.

    Any ``alpha`` from 0 (equal weights) to infinity (the best particle) is exact: the lowest loss is subtracted first.

    Args:
        losses: ``(..., n)``, float32 or float64; infinite ones have weight 0.
        alpha: inverse temperature, >= 0; a tensor ``(...)`` must be > 0 and finite.
        lowest: the lowest losses ``(...)``, where they are known.
    """
    weights = consensus_logits(losses, alpha, lowest).softmax(-1)
    # softmax adds one after the other, which loses digits; sum adds in pairs
    return weights if weights.shape[-1] < _MANY else weights.div_(weights.sum(-1, keepdim=True))


def consensus_logits(losses: Tensor, alpha: float | Tensor, lowest: Tensor | None = None) -> Tensor:
    """``-alpha (losses - lowest)``, the logarithms of :func:`consensus_weights` up to a constant for each run."""
    if isinstance(alpha, Tensor):
        alpha = alpha.unsqueeze(-1)
    else:
        limits = torch.finfo(losses.dtype)
        alpha = min(max(alpha, limits.tiny), limits.max)  # 0 and infinity times infinite losses would be NaN
    return (losses - (losses.amin(-1) if lowest is None else lowest).unsqueeze(-1)).mul_(-alpha)


def alpha_for_sample_size(losses: Tensor, share: float, steps: int = 40) -> Tensor:
    """The alphas ``(...)`` in [1e-5, 1e15] whose weights have the effective sample size ``share * n``, by bisection.

    The effective sample size ``(sum w)^2 / sum w^2`` falls from n to 1 as alpha grows; log alpha is bisected. No host
    synchronisation.
    """
    low, high = (losses.new_full(losses.shape[:-1], math.log(bound)) for bound in (1e-5, 1e15))
    for _ in range(steps):
        middle = (low + high) / 2
        too_even = 1 / consensus_weights(losses, middle.exp()).square().sum(-1) > share * losses.shape[-1]
        low, high = torch.where(too_even, middle, low), torch.where(too_even, high, middle)
    return ((low + high) / 2).exp()


def weighted_mean(points: Tensor, weights: Tensor) -> Tensor:
    """``(runs, n, d)`` points and ``(runs, n)`` weights to ``(runs, d)``, in the points' dtype also under autocast.

    Many particles are added up block by block, so that the error in float32 stays below 1e-6 of the points' size.
    """
    runs, number, dim = points.shape
    if number >= _MANY:
        whole = number - number % _BLOCK
        means = []
        for x, w in zip(points, weights, strict=True):
            blocks = x.new_empty(whole // _BLOCK + 1, 1, dim)
            head, tail = x[:whole].view(-1, _BLOCK, dim), x[whole:]
            torch.bmm(w[:whole].view(-1, 1, _BLOCK), head, out=blocks[:-1])
            torch.mv(tail.T, w[whole:], out=blocks[-1, 0])
            means.append(blocks.sum((0, 1)))
        return torch.stack(means)
    if runs == 1:
        return torch.mv(points[0].T, weights[0], out=points.new_empty(dim))[None]
    return torch.bmm(weights[:, None], points, out=points.new_empty(runs, 1, dim))[:, 0]
