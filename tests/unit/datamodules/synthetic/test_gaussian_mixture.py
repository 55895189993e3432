import pytest
import torch

from lit_methods.datamodules import GaussianMixtureDataModule


def test_points_have_the_moments_of_their_component() -> None:
    data = GaussianMixtureDataModule([[-1.5], [2.5]], [0.5, 0.2], [0.7, 0.3], train_size=20000, val_size=5, test_size=7)
    data.setup("fit")
    x, y = data.train_data
    assert [len(part[0]) for part in (data.train_data, data.val_data, data.test_data)] == [20000, 5, 7]
    assert float((y == 0).float().mean()) == pytest.approx(0.7, abs=0.02)
    for component, mean, std in ((0, -1.5, 0.5), (1, 2.5, 0.2)):
        assert float(x[y == component].mean()) == pytest.approx(mean, abs=0.02)
        assert float(x[y == component].std()) == pytest.approx(std, abs=0.02)
    again = GaussianMixtureDataModule(
        [[-1.5], [2.5]], [0.5, 0.2], [0.7, 0.3], train_size=20000, val_size=5, test_size=7
    )
    again.setup("fit")
    assert torch.equal(again.train_data[0], x)
