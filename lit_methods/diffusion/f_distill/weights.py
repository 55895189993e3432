"""Matching distributions by any f-divergence: the weights, ratios and loss of f-distill as functions for any loop.

Y. Xu, W. Nie and A. Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", arXiv 2502.15681. The
gradient of ``D_f(p || q)`` in a student's samples is that of the reverse KL times ``h(r) = r^2 f''(r)``, where
``r = p / q`` is the density ratio of teacher and student at a noise level, which a discriminator estimates.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Weight = Callable[[Tensor], Tensor]

DIVERGENCES: dict[str, Weight] = {
    "rkl": torch.ones_like,
    "softened_rkl": lambda r: 1 / (1 + r),
    "js": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: 0.25 * r.sqrt(),
    "kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 2 / r.clamp(min=1e-8),
}


def divergence_weight(r: Tensor, divergence: str | Weight = "js") -> Tensor:
    """``h(r) = r^2 f''(r)``, by which the gradient of the reverse KL becomes that of the divergence.

    The more ``h`` grows with ``r``, the more a student is drawn to where the teacher has more mass: from the mode
    seeking softened reverse KL over reverse KL (1: DMD2) and Jensen-Shannon to the covering forward KL.

    Args:
        r: density ratios of teacher to student, > 0, of any shape.
        divergence: ``rkl softened_rkl js squared_hellinger kl jeffreys neyman``, or ``h`` itself as a function.

    Returns:
        Weights shaped like ``r``, without gradient.

    Raises:
        ValueError: an unknown divergence.
    """
    check_divergence(divergence)
    weight = DIVERGENCES[divergence] if isinstance(divergence, str) else divergence
    return weight(r.detach())


def check_divergence(divergence: str | Weight) -> None:
    """Refuse what is neither a divergence nor a function."""
    if divergence not in DIVERGENCES and not callable(divergence):
        raise ValueError(f"divergence must be one of {list(DIVERGENCES)} or a function, got {divergence!r}")


class RatioNormalizer(nn.Module):
    """Density ratios from a discriminator, scaled so that their mean is 1 at every noise level, as theory has it.

    Times are sorted into bins; a ratio is divided by the mean of its bin, over all ranks (one all-reduce a call). The
    means are a buffer, and so are saved.

    Args:
        t_min: smallest time, > 0 where bins are equal in the logarithm.
        t_max: largest time, > ``t_min``.
        num_bins: >= 1.
        ema: share of the former mean of a bin that is kept, in [0, 1).
        clip: smallest and largest ratio before it is scaled, 0 < low < high.
        spacing: bins of equal width in "time" (as in the authors' code, where most samples of an EDM teacher fall into
            the first) or in its logarithm, "log_time".

    Raises:
        ValueError: an argument out of range.
    """

    means: Tensor

    def __init__(
        self,
        t_min: float,
        t_max: float,
        num_bins: int = 10,
        ema: float = 0.0,
        clip: tuple[float, float] = (0.1, 20.0),
        spacing: Literal["time", "log_time"] = "time",
    ) -> None:
        super().__init__()
        if spacing not in ("time", "log_time"):
            raise ValueError(f"spacing must be 'time' or 'log_time', got {spacing!r}")
        if not (math.isfinite(t_min) and math.isfinite(t_max) and t_min < t_max) or (
            spacing == "log_time" and t_min <= 0
        ):
            raise ValueError(f"t_min and t_max must be rising, and > 0 for log_time, got {t_min} and {t_max}")
        if num_bins < 1:
            raise ValueError(f"num_bins must be >= 1, got {num_bins}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {ema}")
        if not 0 < clip[0] < clip[1]:
            raise ValueError(f"clip must be two rising numbers > 0, got {clip}")
        self.t_min, self.t_max, self.num_bins, self.ema, self.clip = t_min, t_max, num_bins, ema, clip
        self.spacing = spacing
        self.register_buffer("means", torch.ones(num_bins))

    @torch.no_grad()
    def forward(self, logits: Tensor, t: Tensor) -> Tensor:
        """Ratios ``(batch,)`` in float32.

        Args:
            logits: of the discriminator, real against student, ``(batch,)`` or ``(batch, heads)``, which are averaged.
            t: times ``(batch,)``.
        """
        r = mean_logit(logits).clamp(-10, 10).exp().clamp(*self.clip)
        low, high, at = self.t_min, self.t_max, t.float()
        if self.spacing == "log_time":
            low, high, at = math.log(low), math.log(high), at.log()
        bins = ((at - low) / (high - low) * self.num_bins).long().clamp(0, self.num_bins - 1)
        sums = torch.zeros(2, self.num_bins, device=r.device)
        sums.index_add_(1, bins, torch.stack([torch.ones_like(r), r]))
        count, total = _over_ranks(sums)
        mean = self.ema * self.means + (1 - self.ema) * total / (count + 1e-6)
        self.means.copy_(torch.where(count > 0, mean, self.means))
        return r / (self.means[bins] + 1e-6)


def mean_logit(logits: Tensor) -> Tensor:
    """``(batch,)`` in float32 of logits ``(batch,)`` or ``(batch, heads)``."""
    return logits.float().flatten(1).mean(1) if logits.ndim > 1 else logits.float()


def normalize_weight(weight: Tensor) -> Tensor:
    """Divide weights ``(batch,)`` by their mean over the batch and all ranks, in float32."""
    weight = weight.detach().float()
    total, count = _over_ranks(torch.stack([weight.sum(), weight.new_full((), len(weight))]))
    return weight / (total / count + 1e-6)


def vsd_loss(
    x: Tensor,
    x0_real: Tensor,
    x0_fake: Tensor,
    weight: Tensor | None = None,
    grad_norm: Literal["dmd", "none"] = "dmd",
) -> Tensor:
    """Loss whose gradient in the student's samples is ``c weight (x0_fake - x0_real)`` over their number of values.

    Args:
        x: samples of the student ``(batch, ...)``.
        x0_real: the teacher's clean sample for the noised ``x``.
        x0_fake: that of the model of the student.
        weight: ``(batch,)`` from :func:`divergence_weight`; ``None``: 1, the reverse KL.
        grad_norm: "dmd": ``c`` is 1 over the mean of ``|x - x0_real|`` of the sample; "none": 1.

    Returns:
        A scalar; its value, half of the mean squared gradient, says nothing of the quality.

    Raises:
        ValueError: shapes that differ, or an unknown ``grad_norm``.
    """
    if not x.shape == x0_real.shape == x0_fake.shape:
        raise ValueError(
            f"x, x0_real and x0_fake must have one shape, got {tuple(x.shape)}, {tuple(x0_real.shape)} and "
            f"{tuple(x0_fake.shape)}"
        )
    if grad_norm not in ("dmd", "none"):
        raise ValueError(f"grad_norm must be 'dmd' or 'none', got {grad_norm!r}")
    with torch.no_grad():
        scale: Any = torch.ones(len(x), device=x.device) if weight is None else weight.float()
        if grad_norm == "dmd":
            scale = scale / ((x - x0_real).float().abs().flatten(1).mean(1) + 1e-6)
        gradient = scale.view(-1, *[1] * (x.ndim - 1)) * (x0_fake - x0_real).float()
        target = x.float() - gradient
    return 0.5 * nn.functional.mse_loss(x.float(), target)


def _over_ranks(sums: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums
