"""Log-probabilities of response tokens without ever holding ``tokens x vocabulary`` in memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """The last layer of a language model: ``logits = softcap(scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight: ``(vocabulary, hidden)``.
        bias: ``(vocabulary,)`` or ``None``.
        scale: factor on the logits (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        softcap: ``c`` of ``c * tanh(logits / c)`` (Gemma 2), or ``None``.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def response_mask(tokens: Tensor, eos_token_ids: list[int]) -> Tensor:
    """Which tokens belong to the response: everything up to the first end-of-sequence token, which counts.

    The mask never looks at the padding token, so a model whose padding is its end of sequence still learns to stop.

    Args:
        tokens: generated tokens, ``(rows, length)``, int64.
        eos_token_ids: every token that ends a response.

    Returns:
        ``(rows, length)``, bool.
    """
    ends = torch.isin(tokens, torch.tensor(eos_token_ids, device=tokens.device))
    return ends.cumsum(1) - ends.long() == 0


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that start at zero at the first real token of every left-padded row, ``(rows, length)``."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def chunked_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, *, temperature: float = 1.0, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy of the distribution it comes from.

    Equal to ``log_softmax(logits / temperature).gather(targets)``, ``chunk_size`` rows at a time, in float32 (float64
    if the inputs are). The backward pass computes the logits of each chunk again: the peak memory is
    ``chunk_size x vocabulary`` instead of ``rows x vocabulary``, twice.

    Args:
        hidden: last hidden states, ``(rows, hidden)``.
        head: the language-model head.
        targets: token ids, ``(rows,)``.
        temperature: sampling temperature that the logits are divided by, positive.
        chunk_size: rows per chunk, at least 1.

    Returns:
        log-probabilities ``(rows,)`` and entropies in nats ``(rows,)``; the entropies carry no gradient.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more")
    return _ChunkedLogProbs.apply(hidden, head.weight, head.bias, targets, head, temperature, chunk_size)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias`` accumulated in float32 whatever the storage type."""
    if hidden.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    else:
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        logits = hidden.to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits + bias


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.settings = (head.scale, head.softcap, temperature, chunk_size)
        logps, entropies = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, target in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
                logits = _logits(rows, weight, bias) * head.scale
                if head.softcap is not None:
                    logits = head.softcap * torch.tanh(logits / head.softcap)
                logits = torch.log_softmax(logits / temperature, dim=-1)
                logps.append(logits.gather(1, target.unsqueeze(1)).squeeze(1))
                entropies.append(-(logits.exp() * logits).sum(-1))
        logp, entropy = torch.cat(logps), torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        scale, softcap, temperature, chunk_size = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        starts = range(0, len(targets), chunk_size)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in starts:
                part = slice(start, start + chunk_size)
                rows, target, grad = hidden[part], targets[part], grads[0][part]
                logits = _logits(rows, weight, bias) * scale
                if softcap is not None:
                    bend = torch.tanh(logits / softcap)
                    logits = softcap * bend
                grad_logits = torch.softmax(logits / temperature, dim=-1).mul_(-grad.unsqueeze(1))
                grad_logits.scatter_add_(1, target.unsqueeze(1), grad.unsqueeze(1).to(grad_logits.dtype))
                grad_logits.mul_(scale / temperature)
                if softcap is not None:
                    grad_logits.mul_(1.0 - bend.square())
                if grad_hidden is not None:
                    grad_hidden[part] = grad_logits.to(weight.dtype) @ weight
                if grad_weight is not None:
                    grad_weight += (grad_logits.to(rows.dtype).T @ rows).to(dtype)
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )
