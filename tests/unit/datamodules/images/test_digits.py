import pytest
import torch
from sklearn.datasets import load_digits

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules import DigitsDataModule


def ready(**arguments) -> DigitsDataModule:
    data = DigitsDataModule(**arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def test_batches():
    batch = next(iter(ready().train_dataloader()))
    assert isinstance(batch, SupervisedBatch)
    assert batch.x.shape == (64, 1, 8, 8)
    assert batch.x.dtype == torch.float32
    assert 0 <= batch.x.min() < batch.x.max() <= 1
    assert batch.y.shape == (64,)
    assert batch.y.dtype == torch.int64
    assert set(batch.y.tolist()) <= set(range(10))


def test_split_is_a_partition_of_the_real_digits():
    data = ready(val_size=100, test_size=200)
    parts = [data.train_data, data.val_data, data.test_data]
    assert [len(part.y) for part in parts] == [1497, 100, 200]
    x = torch.cat([part.x for part in parts]).flatten(1) * 16
    y = torch.cat([part.y for part in parts])
    found = sorted((*row, label) for row, label in zip(x.int().tolist(), y.tolist(), strict=True))
    digits = load_digits()
    expected = sorted((*map(int, row), int(label)) for row, label in zip(digits.data, digits.target, strict=True))
    assert found == expected


def test_split_depends_on_the_seed_alone():
    first, same, other = ready(seed=3), ready(seed=3, batch_size=7), ready(seed=4)
    assert torch.equal(first.test_data.x, same.test_data.x)
    assert not torch.equal(first.test_data.x, other.test_data.x)


def test_no_validation():
    data = ready(val_size=0)
    assert data.val_dataloader() == []
    assert len(data.train_data.y) == 1437


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_size": -1}, r"Invalid val_size=-1: must be an integer in \[0, 1796\]"),
        ({"test_size": 1797}, r"Invalid test_size=1797"),
        ({"val_size": 1000, "test_size": 797}, r"Invalid test_size=797: must be an integer in \[0, 796\]"),
        ({"val_size": 0.1}, r"Invalid val_size=0.1"),
        ({"batch_size": 0}, r"Invalid batch_size=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments)
