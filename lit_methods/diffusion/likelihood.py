"""The likelihood that the probability-flow ODE gives to data (Song et al. 2021, arXiv 2011.13456)."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.grids import Grid, as_grid


@torch.no_grad()
def nll(
    denoiser: Denoiser,
    x: Tensor,
    cond: Any = None,
    *,
    steps: int = 100,
    grid: str | Grid | None = None,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Negative log-likelihood of each sample in nats, as a density with respect to the units of ``x``.

    The density changes along the ODE by the divergence of its velocity, integrated by Heun's method from the data to
    pure noise. Gradients are taken by ``torch.func``, which works where Lightning tests (in inference mode).

    Args:
        denoiser: the model.
        x: data ``(batch, ...)``.
        cond: what the model is told of them.
        steps: steps of the ODE, >= 1; each costs two calls of the network and their gradients.
        grid: where they lie; ``None``: what suits the process.
        probes: random vectors of signs, the same along the whole path, whose mean estimates the divergence without bias
            (Hutchinson); ``None`` computes it exactly at a gradient for each value of a sample.
        generator: source of the probes.
        prior: negative log-density of samples at the last time, ``(batch, ...)`` to ``(batch,)``, which must be what
            sampling starts from; ``None``: normal noise of the process's ``prior_std``.

    Returns:
        ``(batch,)``.

    Raises:
        ValueError: an argument out of range.
    """
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be >= 1, or None for the exact divergence, got {probes}")
    process = denoiser.process
    first = max(process.t_min, 1e-5 * process.t_max) if math.isfinite(process.t_clean) else process.t_min
    times = as_grid(grid, process).times(process, steps)[:-1].flip(0)
    nodes = torch.cat([torch.tensor([first], dtype=torch.float64), times[times > first]]).tolist()
    directions = _directions(x, probes, generator)
    weight = 1.0 if probes is None else 1.0 / probes

    def slope(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        flow, pull = torch.func.vjp(lambda x: denoiser.flow(x, t, cond), x)  # type: ignore[misc]
        along = [(pull(direction)[0] * direction).flatten(1).sum(1) for direction in directions]
        return flow, weight * torch.stack(along).sum(0)

    alpha = float(process.alpha(first))
    change = x.new_full((len(x),), x[0].numel() * math.log(alpha))  # the path begins at alpha x
    x = alpha * x
    for t, r in pairwise(nodes):
        flow, divergence = slope(x, t)
        later_flow, later_divergence = slope(x + (r - t) * flow, r)
        x = x + 0.5 * (r - t) * (flow + later_flow)
        change = change + 0.5 * (r - t) * (divergence + later_divergence)
    if prior is not None:
        return prior(x) - change
    std = process.prior_std
    squares = (x / std).square().flatten(1).sum(1)
    return 0.5 * squares + x[0].numel() * (0.5 * math.log(2 * math.pi) + math.log(std)) - change


def bits_per_dim(nats: Tensor, dims: int, levels: int, value_range: tuple[float, float]) -> Tensor:
    """Bits per value of data that were stored in steps and are seen as a density.

    A density in the units of ``x`` becomes a probability of a level by the width of a level: 2 / 255 for 8-bit images
    in [-1, 1], which adds 6.994 bits; 1 / 255 in [0, 1], 7.994 bits. The data must have had noise of one level added
    (uniform dequantization) for that to be a bound.

    Args:
        nats: negative log-likelihoods of :func:`nll`.
        dims: values in a sample, >= 1.
        levels: how many different values there are, >= 2.
        value_range: the smallest and the largest of them.

    Raises:
        ValueError: an argument out of range.
    """
    low, high = value_range
    if dims < 1:
        raise ValueError(f"dims must be >= 1, got {dims}")
    if levels < 2:
        raise ValueError(f"levels must be >= 2, got {levels}")
    if not low < high:
        raise ValueError(f"value_range must be two rising numbers, got {value_range}")
    return nats / (dims * math.log(2)) + math.log2((levels - 1) / (high - low))


def _directions(x: Tensor, probes: int | None, generator: torch.Generator | None) -> list[Tensor]:
    if probes is not None:
        signs = torch.randint(2, (probes, *x.shape), generator=generator, device=x.device)
        return list((2 * signs - 1).to(x.dtype))
    rows = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
    return [row.view(1, *x.shape[1:]).expand_as(x) for row in rows]
