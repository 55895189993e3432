import math

import pytest
import torch

from lit_methods.optim import AnnealedLangevin


def test_langevin_is_gradient_descent_with_noise_that_dies_down() -> None:
    x = torch.nn.Parameter(torch.zeros(50_000))
    optimizer = AnnealedLangevin([x], lr=0.04, sigma=2.0)
    draws = []
    for k in (1, 2, 3):
        x.data.zero_()
        x.grad = torch.full_like(x, 5.0)
        optimizer.step()
        assert float(x.detach().mean()) == pytest.approx(-0.2, abs=0.02)
        assert float(x.detach().std()) == pytest.approx(2.0 / math.log(k + 1) * 0.2, rel=0.02)
        draws.append(x.detach() + 0.2)
    assert torch.corrcoef(torch.stack(draws)).triu(1).abs().max() < 0.02


def test_groups_get_noise_of_their_own() -> None:
    x, y = (torch.nn.Parameter(torch.zeros(1000)) for _ in range(2))
    optimizer = AnnealedLangevin([{"params": [x]}, {"params": [y]}], lr=0.04, sigma=2.0)
    x.grad, y.grad = torch.zeros_like(x), torch.zeros_like(y)
    optimizer.step()
    assert not torch.equal(x, y)
