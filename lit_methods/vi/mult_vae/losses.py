"""The terms of the loss, without a target matrix."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lit_methods.batches import InteractionBatch
from lit_methods.vi.mult_vae.history import Likelihood


def widen(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``KL(N(mean, exp(log_variance)) || N(0, I))``, ``(users, dim)`` to ``(users,)``."""
    return 0.5 * (log_variance.expm1() - log_variance + mean.square()).sum(1)


def negative_log_likelihood(
    logits: Tensor, batch: InteractionBatch, likelihood: Likelihood, positive_weight: float
) -> Tensor:
    """Mean over users of the negative log-likelihood of their histories; *overwrites* the logits."""
    return _NegativeLogLikelihood.apply(logits, batch, likelihood, positive_weight)


class _NegativeLogLikelihood(torch.autograd.Function):
    """Mean over users of the negative log-likelihood; *overwrites* the logits with their gradient.

    Every likelihood is a function of all logits plus corrections at the items of the history:

    - multinomial: ``N logsumexp(f) - sum_x x f``; gradient ``N softmax(f) - x``;
    - logistic: ``sum softplus(f) - sum_x x f``; gradient ``sigmoid(f) - x``;
    - gaussian: ``sum f^2 / 2 + sum_x (c (f - x)^2 - f^2) / 2``; gradient ``f``, and ``c (f - x)`` where ``x > 0``.

    The multinomial allocates nothing of the logits' size in single precision; half precision computes in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, batch: InteractionBatch, likelihood: Likelihood, positive_weight: float
    ) -> Tensor:
        half = logits.dtype in (torch.bfloat16, torch.float16)
        f = logits.float() if half else logits
        rows, items = batch.rows(), batch.items
        x = torch.ones_like(items, dtype=f.dtype) if batch.values is None else batch.values.to(f.dtype)
        at_x = f[rows, items]
        if likelihood == "multinomial":
            n = torch.zeros_like(f[:, 0]).index_add(0, rows, x)
            largest = f.amax(1, keepdim=True)
            f.sub_(largest).exp_()
            sums = f.sum(1)
            total = (n * (largest.squeeze(1) + sums.log())).sum() - x @ at_x
            f.mul_((n / sums)[:, None])
            correction = -x
        elif likelihood == "logistic":
            total = functional.softplus(f).sum() - x @ at_x
            f.sigmoid_()
            correction = -x
        else:
            residual = positive_weight * (at_x - x)
            total = 0.5 * (f.square().sum() + residual @ (at_x - x) - at_x @ at_x)
            correction = residual - at_x
        f.index_put_((rows, items), correction, accumulate=True)
        ctx.gradient = logits.copy_(f) if half else f
        return total / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.gradient is None:
            raise RuntimeError("The likelihood's gradient was used up: call backward once for each training_step.")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(scale / len(gradient)), None, None, None
