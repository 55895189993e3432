import pytest
import torch
from torch import nn

from lit_methods.optim import PiecewiseConstantLR


def test_factors_hold_from_their_step_on() -> None:
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [p], "lr": 1.0}, {"params": [q], "lr": 10.0}])
    schedule = PiecewiseConstantLR(optimizer, {4: 0.5, 2: 0.1})
    seen = []
    for _ in range(6):
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        schedule.step()
    factors = [1.0, 1.0, 0.1, 0.1, 0.5, 0.5]
    assert seen == [(f, 10 * f) for f in factors]


@pytest.mark.parametrize("factors", [{-1: 0.1}, {3: -0.1}])
def test_negative_numbers_are_refused(factors) -> None:
    with pytest.raises(ValueError, match="factors must map"):
        PiecewiseConstantLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), factors)
