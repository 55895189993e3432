"""The same few observations for every path."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from lit_methods.datamodules.series.shared_times import one_grid, path_rows
from lit_methods.datamodules.tensors import TensorDataModule, check_int


class BridgeDataModule(TensorDataModule):
    """A few observations that all rows share, so that a batch is that many paths of one posterior: bridges.

    The paths start at time 0, which is in the batch but not observed. Batches are
    :class:`~lit_methods.batches.PathBatch` with values float32 ``(batch, 1 + observations, 1)``. Validation, test and
    prediction have ``eval_size`` rows in one batch.

    Args:
        times: of the observations, increasing, > 0.
        values: what was observed.
        batch_size: paths per batch on each rank, >= 1.
        steps_per_epoch: batches per epoch on each rank, >= 1.
        eval_size: paths in an evaluation, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: >= 0; nothing depends on it.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        times: Sequence[float] = (2.0,),
        values: Sequence[float] = (0.0,),
        batch_size: int = 32,
        steps_per_epoch: int = 100,
        eval_size: int = 1000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, transform=one_grid)
        if not times or not all(0 <= a < b < float("inf") for a, b in pairwise([0.0, *times])):
            raise ValueError(f"Invalid times={times!r}: must increase strictly from above 0 and be finite.")
        if len(values) != len(times) or not all(abs(value) < float("inf") for value in values):
            raise ValueError(f"Invalid values={values!r}: must hold a finite number for each of {len(times)} times.")
        self.times = torch.tensor([0.0, *times])
        self.values = torch.tensor([0.0, *values])
        self.steps_per_epoch = check_int("steps_per_epoch", steps_per_epoch, 1)
        self.eval_size = check_int("eval_size", eval_size, 1)

    def setup(self, stage: str) -> None:
        """Repeat the observations."""
        ranks = self._ranks()[0]
        self.train_data = self._rows(self.batch_size * self.steps_per_epoch * ranks)
        self.val_data = self.test_data = self._rows(self.eval_size)

    def _rows(self, number: int) -> tuple[torch.Tensor, ...]:
        seen = torch.ones(len(self.times), dtype=torch.bool)
        seen[0] = False
        return path_rows(self.times, self.values[None, :, None].expand(number, -1, -1), seen.expand(number, -1))
