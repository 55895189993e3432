"""Large sets of images or latents in array files, read as they are needed."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules.tensors import TensorDataModule, check_range

SPLITS = ("train", "val", "test")


class ArrayFilesDataModule(TensorDataModule):
    """Samples and what is known of them from ``<split>_x.npy`` and ``<split>_y.npy`` in a folder.

    For what does not fit in memory: files are mapped, and a batch reads its rows only. Images of a folder, or latents
    and embedded prompts computed once, are written so by ``numpy.save``. Batches are
    :class:`~lit_methods.batches.SupervisedBatch`: ``x`` float32, scaled where the file has bytes; ``y`` int64 or
    float32.

    Args:
        data_dir: the folder; ``train_x.npy`` and ``train_y.npy`` must be there, ``val`` and ``test`` may.
        value_range: what bytes 0 and 255 become.
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: of the order, >= 0.

    Raises:
        ValueError: an argument out of range; in ``setup``, files of unequal length.
        FileNotFoundError: in ``setup``, a file is missing; says which.
    """

    def __init__(
        self,
        data_dir: str,
        value_range: tuple[float, float] = (-1.0, 1.0),
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, transform=self._scaled)
        self.data_dir = Path(data_dir)
        self.value_range = check_range("value_range", value_range)

    def setup(self, stage: str) -> None:
        """Map the files."""
        rows = {split: self._read(split) for split in SPLITS}
        self.train_data, self.val_data, self.test_data = rows["train"], rows["val"], rows["test"]

    def _read(self, split: str) -> SupervisedBatch | None:
        paths = [self.data_dir / f"{split}_{part}.npy" for part in ("x", "y")]
        if split != "train" and not any(path.exists() for path in paths):
            return None
        if missing := [str(path) for path in paths if not path.is_file()]:
            raise FileNotFoundError(
                f"ArrayFilesDataModule lacks {' and '.join(missing)}: write arrays whose first dimension counts "
                "samples by numpy.save"
            )
        # Copy on write, which nobody does: torch wants memory that could be written to.
        x, y = (torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)) for path in paths)
        if len(x) != len(y):
            raise ValueError(f"{split}_x.npy and {split}_y.npy must hold equally many rows, got {len(x)} and {len(y)}")
        return SupervisedBatch(x, y)

    def _scaled(self, batch: SupervisedBatch) -> SupervisedBatch:
        low, high = self.value_range
        x = batch.x.float() * ((high - low) / 255) + low if batch.x.dtype == torch.uint8 else batch.x.float()
        return SupervisedBatch(x, _as_target(batch.y))


def _as_target(y: Tensor) -> Tensor:
    return y.float() if y.is_floating_point() else y.long()
