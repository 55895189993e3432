"""Time series of one's own, as arrays."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.batches import TimeSeriesBatch
from lit_methods.datamodules.tensors import ShuffledSampler, TensorDataModule, TensorRows


class PinnedSampler(ShuffledSampler):
    """Rank ``r`` of ``n`` gets rows ``r, r + n, ...`` in every epoch, in a new order; short ranks repeat some."""

    def order(self, epoch: int) -> list[int]:
        """Return this rank's rows of an epoch."""
        self.set_epoch(epoch)
        mine = list(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed + epoch)
        shuffled = [mine[i] for i in torch.randperm(len(mine), generator=generator).tolist()]
        return (shuffled * 2)[: self.num_samples]


class TimeSeriesDataModule(TensorDataModule):
    """Time series of your own, as arrays ``(series, steps, numbers)``.

    Batches are :class:`~lit_methods.batches.TimeSeriesBatch`. Steps after a series' end are NaN in all numbers, at the
    end only; NaN elsewhere is a step that was not observed.

    Args:
        train: array or tensor, or the path of a ``.npy`` file.
        val: of the same steps and numbers as ``train``, or ``None`` for no validation.
        test: likewise.
        batch_size: series per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        pin_to_ranks: every rank keeps its series in all epochs, as ``PVRNNModule(shard_adaptive=True)`` needs it.
        seed: of the order, >= 0.

    Raises:
        ValueError: an argument out of range, a file that is no array of numbers, or a wrong shape.
    """

    def __init__(
        self,
        train: Tensor | np.ndarray | str | Path,
        val: Tensor | np.ndarray | str | Path | None = None,
        test: Tensor | np.ndarray | str | Path | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_to_ranks: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.pin_to_ranks = pin_to_ranks
        self.sources = {"train": train, "val": val, "test": test}

    @property
    def num_sequences(self) -> int:
        """Training series."""
        return len(self._training().rows)

    @property
    def seq_len(self) -> int:
        """Their steps."""
        return self._training().values.shape[1]

    def setup(self, stage: str) -> None:
        """Read the arrays."""
        found = {name: as_series(name, source) for name, source in self.sources.items() if source is not None}
        for name, series in found.items():
            if series.values.shape[2] != found["train"].values.shape[2]:
                raise ValueError(
                    f"{name} must have {found['train'].values.shape[2]} numbers a step as train, got "
                    f"{series.values.shape[2]}"
                )
        self.train_data, self.val_data, self.test_data = (found.get(name) for name in ("train", "val", "test"))

    def train_dataloader(self) -> StatefulDataLoader:
        """Return a loader over this rank's share of the training series, reshuffled every epoch."""
        loader = super().train_dataloader()
        if not self.pin_to_ranks:
            return loader
        rows = TensorRows(self._training())
        sampler = PinnedSampler(rows, *self._ranks(), seed=self.seed)
        sampler.set_epoch(loader.sampler.epoch)
        return self._loader(rows, sampler)

    def _training(self) -> TimeSeriesBatch:
        if self.train_data is None:
            self.setup("fit")
        assert isinstance(self.train_data, TimeSeriesBatch)
        return self.train_data


def as_series(name: str, source: Tensor | np.ndarray | str | Path) -> TimeSeriesBatch:
    """All rows of an array or a ``.npy`` file, which is read without unpickling anything.

    Raises:
        ValueError: it is no array ``(series, steps, numbers)`` of numbers; ``FileNotFoundError``: there is no file.
    """
    where = f"{name} ({source})" if isinstance(source, str | Path) else name
    if isinstance(source, str | Path):
        try:
            source = np.load(source, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{where} must be a .npy file of numbers: {error}") from error
    if not isinstance(source, Tensor) and np.asarray(source).dtype.kind not in "fiu":
        raise ValueError(f"{where} must hold numbers, got dtype {np.asarray(source).dtype}")
    values = torch.as_tensor(source)
    if values.dim() != 3 or 0 in values.shape:
        raise ValueError(f"{where} must be (series, steps, numbers), got {tuple(values.shape)}")
    values = values if values.is_floating_point() else values.float()
    if values.isinf().any():
        row, step, number = values.isinf().nonzero()[0].tolist()
        raise ValueError(f"{where} must be finite or NaN, got infinity in series {row}, step {step}, number {number}")
    gaps = values.isnan()
    if (gaps.any(2) != gaps.all(2)).any():
        row, step = (gaps.any(2) != gaps.all(2)).nonzero()[0].tolist()
        raise ValueError(f"{where} must have all numbers of a step or none, got some in series {row}, step {step}")
    return TimeSeriesBatch(torch.arange(len(values)), values, ~gaps.all(2))
