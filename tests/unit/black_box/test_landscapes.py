import math

import pytest
import torch

from lit_methods.black_box import Ackley, GrandCanyon, Rastrigin


@pytest.mark.parametrize("objective", [Ackley(), GrandCanyon(), Rastrigin(), Rastrigin(10.0)])
def test_the_minimum_is_zero_at_zero(objective) -> None:
    origin = torch.zeros(2, dtype=torch.float64)
    assert objective(origin).abs() < 1e-12
    around = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    assert (objective(around) > 0).all()
    assert objective(around.view(50, 100, 2)).shape == (50, 100)


def test_values_by_hand() -> None:
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(Rastrigin(2.5)(x), torch.tensor(0.25 + 1 + 4 + 5).double())
    expected = 20 - 20 * math.exp(-0.2 * math.sqrt(5.25 / 3)) + math.e - math.exp((-1 + 1 + 1) / 3)
    assert float(Ackley()(x)) == pytest.approx(expected)


def test_gradient_descent_in_the_canyon_stops_where_the_paper_says() -> None:
    x = torch.nn.Parameter(torch.tensor([8.0, 8.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.01)
    for _ in range(2000):
        optimizer.zero_grad()
        GrandCanyon()(x).backward()
        optimizer.step()
    torch.testing.assert_close(x.detach(), torch.tensor([2.3363, 2.4663]).double(), rtol=0, atol=1e-3)


def test_height_must_be_positive() -> None:
    with pytest.raises(ValueError, match="height must be > 0 and finite, got 0"):
        Rastrigin(0.0)
