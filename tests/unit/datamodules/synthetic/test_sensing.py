import pytest
import torch

from lit_methods.batches import EntriesBatch, RankOneBatch, SensingBatch
from lit_methods.datamodules import SensingDataModule


class Ranked(SensingDataModule):
    ranks = (1, 0)

    def _ranks(self):
        return self.ranks


def ready(cls=SensingDataModule, **arguments):
    data = cls(**{"rows": 6, "rank": 2, "num_measurements": 12, "dtype": "float64", **arguments})
    data.setup("fit")
    return data


def test_matrix_has_the_spectrum_and_measurements_are_of_it():
    data = ready(rank=3, condition_number=4.0)
    (m,) = data.val_data.matrix
    torch.testing.assert_close(torch.linalg.eigvalsh(m)[-3:], torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64))
    assert int(torch.linalg.matrix_rank(m)) == 3
    a, y = data.train_data
    torch.testing.assert_close((a * m).sum((1, 2)), y)


def test_rectangular_and_entries():
    data = ready(columns=4, symmetric=False, measurements="entries", num_measurements=None)
    rows, columns, values = data.train_data
    (m,) = data.val_data.matrix
    assert m.shape == (6, 4)
    assert sorted((rows * 4 + columns).tolist()) == list(range(24))
    torch.testing.assert_close(values, 24**0.5 * m[rows, columns])


def test_noise_has_its_standard_deviation():
    clean, noisy = (ready(num_measurements=5000, noise_std=s) for s in (0.0, 0.5))
    assert float((noisy.train_data.values - clean.train_data.values).std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("measurements", "kind"), [("gaussian", SensingBatch), ("rank_one", RankOneBatch), ("entries", EntriesBatch)]
)
def test_full_batches_are_shared_out_and_repeated(measurements, kind):
    parts = []
    for rank in (0, 1):
        Ranked.ranks = (2, rank)
        batches = list(ready(Ranked, measurements=measurements, steps_per_epoch=3).train_dataloader())
        assert [type(b) for b in batches] == [kind] * 3
        assert all(torch.equal(b.values, batches[0].values) for b in batches)
        parts.append(batches[0].values)
    assert sorted(torch.cat(parts).tolist()) == sorted(ready(measurements=measurements).train_data.values.tolist())
    Ranked.ranks = (5, 0)
    with pytest.raises(ValueError, match="do not divide into equal shares"):
        ready(Ranked).train_dataloader()


def test_mini_batches_cover_the_measurements():
    batches = list(ready(batch_size=5).train_dataloader())
    assert [len(b.values) for b in batches] == [5, 5, 2]


def test_every_rank_evaluates_the_same_matrix():
    Ranked.ranks = (4, 3)
    data = ready(Ranked)
    (batch,) = data.val_dataloader()
    assert torch.equal(batch.matrix, data.val_data.matrix)


@pytest.mark.parametrize(
    "arguments",
    [{"columns": 4}, {"condition_number": 0.5}, {"noise_std": -1.0}, {"dtype": "int8"}, {"measurements": "fourier"}],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="Invalid"):
        SensingDataModule(6, rank=1, **arguments)
