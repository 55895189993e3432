"""One and the same observation, over and over: for inference in a model of one data set."""

import math

import torch

from lit_methods.batches import ObservationBatch
from lit_methods.datamodules.tensors import TensorDataModule, check_int


class RepeatedObservationDataModule(TensorDataModule):
    """The same numbers in every row: each step of an optimizer sees all there is.

    Batches are :class:`~lit_methods.batches.ObservationBatch`: ``values`` float32 ``(batch, len(values))``. Validation
    and test data are one row for each rank.

    Args:
        values: what was observed, finite numbers.
        repeats: rows of an epoch, >= 1.
        batch_size: rows per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: of the order, which does not matter, >= 0.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self, values: list[float], repeats: int = 1000, batch_size: int = 1, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if not values or not all(math.isfinite(value) for value in values):
            raise ValueError(f"Invalid values={values!r}: must be a list of finite numbers.")
        self.values = list(values)
        self.repeats = check_int("repeats", repeats, 1)

    def setup(self, stage: str) -> None:
        """Repeat the observation."""
        row = torch.tensor(self.values, dtype=torch.get_default_dtype())
        self.train_data = ObservationBatch(row.repeat(self.repeats, 1))
        self.val_data = self.test_data = ObservationBatch(row.repeat(self._ranks()[0], 1))
