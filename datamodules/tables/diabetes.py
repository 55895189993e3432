"""The diabetes data that scikit-learn ships: a small real problem for regression."""

import torch
from sklearn.datasets import load_diabetes

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules.tensors import TensorDataModule, check_int

_NUM_SAMPLES = 442


class DiabetesDataModule(TensorDataModule):
    """Progression of diabetes in 442 patients from 10 measurements (Efron et al., *Least angle regression*, 2004).

    Bundled with scikit-learn, so nothing is fetched. Batches are :class:`~lit_methods.batches.SupervisedBatch`: ``x``
    float32 ``(batch, 10)`` and ``y`` float32 ``(batch, 1)``, both scaled to mean 0 and variance 1 on the training part.
    The split is a permutation drawn from ``seed``.

    Args:
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the split and of the sample order, >= 0.
        val_size: number of validation examples, >= 0 (0: no validation).
        test_size: number of test examples, >= 0; at least two examples must be left for training.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self, batch_size: int = 64, num_workers: int = 0, seed: int = 0, val_size: int = 61, test_size: int = 61
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.val_size = check_int("val_size", val_size, 0, _NUM_SAMPLES - 2)
        self.test_size = check_int("test_size", test_size, 0, _NUM_SAMPLES - 2 - val_size)

    def setup(self, stage: str) -> None:
        """Read the data, split and scale it."""
        data = load_diabetes(scaled=False)
        x, y = torch.from_numpy(data.data).float(), torch.from_numpy(data.target).float()[:, None]
        order = torch.randperm(_NUM_SAMPLES, generator=torch.Generator().manual_seed(self.seed))
        sizes = [_NUM_SAMPLES - self.val_size - self.test_size, self.val_size, self.test_size]
        train = order[: sizes[0]]
        x, y = ((value - value[train].mean(0)) / value[train].std(0) for value in (x, y))
        self.train_data, self.val_data, self.test_data = (SupervisedBatch(x[i], y[i]) for i in order.split(sizes))
