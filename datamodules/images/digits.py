"""The 8x8 handwritten digits that scikit-learn ships: real data that needs no download."""

import torch
from sklearn.datasets import load_digits

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules.tensors import TensorDataModule, check_int, check_range

_NUM_SAMPLES = 1797


class DigitsDataModule(TensorDataModule):
    """Optical recognition of handwritten digits: 1797 grey images of 8x8 pixels, ten classes.

    The UCI set's test part as bundled with scikit-learn (Alpaydin and Kaynak, 1998), so nothing is fetched. Batches are
    :class:`~lit_methods.batches.SupervisedBatch`: ``x`` float32 ``(batch, 1, 8, 8)`` in [0, 1], ``y`` int64
    ``(batch,)`` in 0..9. The split is a permutation drawn from ``seed``: training, then validation, then test rows.

    Args:
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the split and of the sample order, >= 0.
        val_size: number of validation images, >= 0 (0: no validation).
        test_size: number of test images, >= 0; at least one image must be left for training.
        value_range: what black and white become; models of images want (-1, 1).

    Raises:
        ValueError: for an argument out of range.
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        val_size: int = 180,
        test_size: int = 360,
        value_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.val_size = check_int("val_size", val_size, 0, _NUM_SAMPLES - 1)
        self.test_size = check_int("test_size", test_size, 0, _NUM_SAMPLES - 1 - val_size)
        self.value_range = check_range("value_range", value_range)

    def setup(self, stage: str) -> None:
        """Read the digits and split them."""
        digits = load_digits()
        x = torch.from_numpy(digits.images).float().div_(16).unsqueeze_(1)
        low, high = self.value_range
        x = low + (high - low) * x
        y = torch.from_numpy(digits.target).long()
        order = torch.randperm(_NUM_SAMPLES, generator=torch.Generator().manual_seed(self.seed))
        sizes = [_NUM_SAMPLES - self.val_size - self.test_size, self.val_size, self.test_size]
        self.train_data, self.val_data, self.test_data = (SupervisedBatch(x[i], y[i]) for i in order.split(sizes))
