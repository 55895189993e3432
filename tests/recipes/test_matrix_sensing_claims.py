"""The claims of recipes/matrix_sensing at their full size (50x50, rank 3), without the Trainer."""

import math

import pytest
import torch
from torch import Tensor

from lit_methods.datamodules import SensingDataModule
from lit_methods.sensing import AsymmetricSensing, SymmetricSensing, rebalance_factors_

LR = 0.1


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    data = SensingDataModule(50, rank=3, measurements="entries", num_measurements=None, dtype="float64")
    data.setup("fit")
    return data.val_data.matrix[0]


def errors(
    module: SymmetricSensing | AsymmetricSensing, matrix: Tensor, steps: list[int], rebalance_at: int = 0
) -> dict[int, Tensor]:
    """Squared errors of all runs after these steps of gradient descent, by its formulas: all entries are observed."""
    left, right = (factor.detach().double() for factor in module.factors())
    found = {}
    for step in range(1, max(steps) + 1):
        residual = left @ right.mT - matrix
        left, right = left - LR * residual @ right, right - LR * residual.mT @ left
        if step == rebalance_at:
            rebalance_factors_(left, right, beta=0.5)
        if step in steps:
            found[step] = (left @ right.mT - matrix).square().sum((-2, -1))
    return found


def test_one_factor_is_linear_with_the_exact_rank_and_slow_with_more(matrix) -> None:
    torch.manual_seed(0)
    assert errors(SymmetricSensing(50, 3), matrix, [500])[500] < 1e-20
    found = errors(SymmetricSensing(50, 5), matrix, [2000, 4000, 20000])
    assert found[4000] > 1e-6
    assert -2.2 < math.log(found[20000] / found[2000]) / math.log(10) < -1.5
    assert found[20000] == pytest.approx(2 / (2 * LR * 20000) ** 2, rel=0.1)  # two columns too many


def test_two_factors_are_linear_at_a_rate_that_grows_with_the_scale(matrix) -> None:
    torch.manual_seed(0)
    found = errors(AsymmetricSensing(50, 50, 5, (1.0, 0.5, 0.2)), matrix, [1000, 2000])
    assert found[2000][1] < 1e-25
    assert found[1000].diff().gt(0).all()
    rate = (found[2000][2] / found[1000][2]).log() / 1000
    assert -0.02 < rate < -0.002


def test_one_extra_step_frees_the_rate_from_the_scale(matrix) -> None:
    torch.manual_seed(0)
    found = errors(AsymmetricSensing(50, 50, 5, (0.05, 0.2, 0.5)), matrix, [600, 800, 1000], rebalance_at=400)
    assert found[1000].max() < 1e-17
    rates = (found[800] / found[600]).log() / 200
    torch.testing.assert_close(rates, torch.full_like(rates, 2 * math.log(1 - LR * 0.5**2)), rtol=0.05, atol=0)


def test_gaussian_measurements_show_the_same_picture() -> None:
    """n = 20, rank 2 with singular values 1 and 0.5, 600 measurements."""
    data = SensingDataModule(20, rank=2, num_measurements=600, condition_number=2.0, dtype="float64")
    data.setup("fit")
    (matrix,) = data.val_data.matrix

    def descend(module: SymmetricSensing | AsymmetricSensing, steps: int) -> Tensor:
        optimizer = torch.optim.SGD(module.parameters(), lr=LR)
        for _ in range(steps):
            optimizer.zero_grad()
            residual = data.train_data.measure(*module.factors()) - data.train_data.values
            (module.loss_factor * residual.square().mean(-1).sum()).backward()
            optimizer.step()
        return (module().detach() - matrix).square().sum((-2, -1))

    torch.manual_seed(0)
    two = AsymmetricSensing(20, 20, 4, (0.2, 0.05)).double()
    descend(two, 600)
    rebalance_factors_(two.left.data[1], two.right.data[1], beta=0.5)
    plain, rebalanced = descend(two, 1800)
    slow = descend(SymmetricSensing(20, 4).double(), 2400)
    assert slow > 3 * plain > 1e-10, (slow, plain)
    assert rebalanced < 1e-18
