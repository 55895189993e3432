"""ArmijoSGD against the sequence of steps computed here."""

import math

import pytest
import torch
from torch import Tensor, nn

from lit_methods.optim import ArmijoSGD

CURVATURE = torch.tensor([1.0, 10.0], dtype=torch.float64)


def loss_at(x: Tensor) -> Tensor:
    return 0.5 * (CURVATURE * x.square()).sum()


@pytest.mark.parametrize("with_evaluate", [True, False])
def test_steps_are_the_first_of_their_sequence_that_armijo_accepts(with_evaluate) -> None:
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    optimizer = ArmijoSGD([x], lr=2.0, c=0.3, decay=0.5, grow=1.5)
    last = 2.0
    for _ in range(6):
        before = x.detach().clone()
        gradient = CURVATURE * before
        expected = min(1.5 * last, 2.0)
        while loss_at(before - expected * gradient) > loss_at(before) - 0.3 * expected * gradient.square().sum():
            expected *= 0.5

        def closure() -> Tensor:
            x.grad = None
            value = loss_at(x)
            value.backward()
            return value

        seen = []
        evaluate = (lambda seen=seen: seen.append(torch.is_grad_enabled()) or loss_at(x)) if with_evaluate else None
        returned = optimizer.step(closure, evaluate)
        assert float(returned) == float(loss_at(before))
        assert not any(seen)
        torch.testing.assert_close(x.detach(), before - expected * gradient)
        last = expected
        assert optimizer.state["armijo"]["step_size"] == expected


def test_stays_where_no_step_is_accepted() -> None:
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    optimizer = ArmijoSGD([x], max_trials=2, lr=100.0)

    def closure() -> Tensor:
        x.grad = None
        value = loss_at(x)
        value.backward()
        return value

    optimizer.step(closure)
    assert x.tolist() == [1.0, 1.0]
    for _ in range(40):
        optimizer.step(closure)
    assert loss_at(x) < 1.0


def test_not_finite_gradients_change_nothing() -> None:
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def closure() -> Tensor:
        x.grad = torch.full_like(x, math.nan)
        return loss_at(x)

    ArmijoSGD([x]).step(closure)
    assert x.tolist() == [1.0, 1.0]


def test_needs_a_closure() -> None:
    with pytest.raises(RuntimeError, match="call step"):
        ArmijoSGD([nn.Parameter(torch.ones(2))]).step()


def test_a_trial_that_reaches_the_demanded_decrease_exactly_is_accepted() -> None:
    """p²/2 from 1: the step 1 halves the linear decrease, which is what c = 0.5 demands."""
    p = nn.Parameter(torch.ones(()))
    optimizer = ArmijoSGD([p], lr=1.0, c=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * p * p
        loss.backward()
        return loss

    optimizer.step(closure)
    assert p == 0
