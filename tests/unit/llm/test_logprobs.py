import pytest
import torch
from torch import Tensor

from lit_methods.llm.logprobs import Head, chunked_logprobs, position_ids, response_mask


def plain(hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    full = (logits / temperature).log_softmax(-1)
    return full.gather(1, targets.unsqueeze(1)).squeeze(1), -(full.exp() * full).sum(-1)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize(("scale", "softcap", "temperature"), [(1.0, None, 1.0), (0.25, None, 0.7), (2.0, 1.5, 1.3)])
def test_equals_the_plain_log_softmax_with_its_gradients(
    chunk_size: int, scale: float, softcap: float | None, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(7, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = torch.randn(11, 4, dtype=torch.float64, generator=generator)
    bias = torch.randn(11, dtype=torch.float64, generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    targets = torch.randint(11, (7,), generator=generator)
    head = Head(weight, bias, scale, softcap)
    upstream = torch.randn(7, dtype=torch.float64, generator=generator)
    ours, entropy = chunked_logprobs(hidden, head, targets, temperature=temperature, chunk_size=chunk_size)
    expected, expected_entropy = plain(hidden, head, targets, temperature)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    assert not entropy.requires_grad
    grads = torch.autograd.grad(ours, leaves, upstream)
    for grad, correct in zip(grads, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(grad, correct)


def test_frozen_head_gets_no_gradient_and_bf16_is_accumulated_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16().requires_grad_()
    head = Head(torch.randn(500, 32, generator=generator).bfloat16())
    targets = torch.randint(500, (64,), generator=generator)
    logps, _ = chunked_logprobs(hidden, head, targets, chunk_size=10)
    assert logps.dtype == torch.float32
    exact, _ = plain(hidden.double(), Head(head.weight.double()), targets, 1.0)
    assert (logps.double() - exact).abs().max() < 1e-4
    (grad,) = torch.autograd.grad(logps.sum(), hidden)
    assert grad.dtype == torch.bfloat16


def test_autocast_does_not_round_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(16, 32, generator=generator), torch.randn(99, 32, generator=generator)
    targets = torch.randint(99, (16,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = chunked_logprobs(hidden, Head(weight), targets)
    torch.testing.assert_close(logps, plain(hidden, Head(weight), targets, 1.0)[0])


def test_mask_ends_with_the_first_end_token_even_if_it_is_the_padding() -> None:
    tokens = torch.tensor([[5, 1, 1, 1], [5, 6, 7, 8], [2, 0, 1, 0], [1, 5, 5, 5]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert response_mask(tokens, [1, 2]).int().tolist() == expected


def test_positions_start_at_the_first_real_token() -> None:
    assert position_ids(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0"):
        chunked_logprobs(torch.zeros(1, 1), Head(torch.zeros(2, 1)), torch.zeros(1).long(), temperature=0.0)
    with pytest.raises(ValueError, match="chunk_size=0"):
        chunked_logprobs(torch.zeros(1, 1), Head(torch.zeros(2, 1)), torch.zeros(1).long(), chunk_size=0)
