"""The encoder's baseline: its loss, gaps, and that it learns."""

import math

import pytest
import torch

from lit_methods.vi.pv_rnn import VRNN


def test_learns_sines_and_goes_on() -> None:
    torch.manual_seed(0)
    values = 0.8 * torch.sin(torch.arange(20) * (math.pi / 4) + torch.arange(8)[:, None])[..., None]
    network = VRNN(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    before = network.loss(values).mean()
    for _ in range(300):
        optimizer.zero_grad()
        network.loss(values).mean().backward()
        optimizer.step()
    assert network.loss(values).mean() < 0.2 * before
    future = network.generate(4, network.recognise(values[:, :16]))
    assert future.shape == (8, 4, 1)
    assert (future - values[:, 16:]).square().mean() < 0.5 * values.square().mean()


def test_gaps_do_not_count() -> None:
    torch.manual_seed(0)
    network, values = VRNN(2), torch.rand(3, 5, 2)
    mask = torch.tensor([True, True, False, False, False]).expand(3, 5)
    broken = torch.where(mask[..., None], values, math.nan)
    torch.manual_seed(1)
    loss = network.loss(broken, mask)
    torch.manual_seed(1)
    torch.testing.assert_close(loss, network.loss(values[:, :2]))
    loss.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_bad_arguments() -> None:
    for name in ("output_size", "hidden_size", "latent_size", "features"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            VRNN(**({"output_size": 1} | {name: 0}))
