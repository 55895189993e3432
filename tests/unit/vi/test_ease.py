import pytest
import torch

from lit_methods.batches import InteractionBatch
from lit_methods.vi import EASE


def history(x: torch.Tensor) -> InteractionBatch:
    rows, items = x.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (x != 0).sum(1).cumsum(0)])
    return InteractionBatch(items, offsets, x[rows, items], items[:0], torch.zeros_like(offsets))


def test_each_column_is_a_ridge_regression_on_the_other_items() -> None:
    x = (torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    ease = EASE(history(x), 6, l2=3.0)
    for item in range(6):
        others = [i for i in range(6) if i != item]
        a = x[:, others].double()
        solution = torch.linalg.solve(a.T @ a + 3.0 * torch.eye(5, dtype=a.dtype), a.T @ x[:, item].double())
        torch.testing.assert_close(ease.weight[others, item], solution.float())
    assert ease.weight.diagonal().abs().max() == 0
    torch.testing.assert_close(ease(history(x)), x @ ease.weight)
    unit = history(x)._replace(values=None)
    torch.testing.assert_close(EASE(unit, 6, l2=3.0)(unit), ease(history(x)))


def test_bad_arguments() -> None:
    batch = history(torch.eye(3))
    with pytest.raises(ValueError, match="l2 must be > 0"):
        EASE(batch, 3, l2=0.0)
    with pytest.raises(ValueError, match="num_items must exceed"):
        EASE(batch, 2)
