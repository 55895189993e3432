"""Score matching on positive data without noise."""

from collections.abc import Callable

import torch
from torch import Tensor


def nonneg_score_matching_loss(
    psi: Callable[[Tensor], Tensor],
    x: Tensor,
    num_probes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Hyvärinen's score matching for non-negative data.

    It is the mean of :math:`\sum_i 2 x_i \psi_i + x_i^2 \partial_i\psi_i + x_i^2 \psi_i^2 / 2`.

    Up to a constant it is half of the squared error of ``x psi`` against ``x grad log p`` (Hyvärinen 2007, *Some
    extensions of score matching*); the multiplicative model without noise. It needs ``x^2 psi p -> 0`` at the boundary.

    Args:
        psi: the score: samples ``(batch, ...)`` to the same shape, each row from its own; differentiable by
            ``torch.func.jvp``.
        x: positive samples ``(batch, ...)``.
        num_probes: random signs that estimate the divergence, >= 1; ``None``: exactly, by one derivative a dimension.
        generator: of the signs.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: an argument out of range, or data that is not positive.
    """
    if num_probes is not None and num_probes < 1:
        raise ValueError(f"num_probes must be >= 1 or None, got {num_probes}")
    check_positive_data(x, "x")
    if num_probes is None:
        size = x[0].numel()
        probes = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:]).expand(size, *x.shape)
    else:
        probes = torch.empty(num_probes, *x.shape, dtype=x.dtype, device=x.device)
        probes = 2 * probes.bernoulli_(0.5, generator=generator) - 1
    score, trace = psi(x), torch.zeros_like(x)
    for v in probes:
        trace = trace + v * x**2 * torch.func.jvp(psi, (x,), (v,))[1]
    trace = trace / (num_probes or 1)
    return (2 * x * score + trace + 0.5 * (x * score) ** 2).flatten(1).sum(1).mean()


def check_positive_data(x: Tensor, name: str, cure: str = "shift the data or drop such rows") -> None:
    """Refuse data that has no logarithm."""
    if len(x) and not bool((x > 0).all()):
        raise ValueError(f"{name} must be > 0 everywhere, got a minimum of {float(x.min()):g}: {cure}")
