"""Data sets in LIBSVM's text format, such as mushrooms, ijcnn1 and rcv1."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_svmlight_file
from torch import Tensor

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules.reading import open_unpacked, reading
from lit_methods.datamodules.tensors import TensorDataModule, check_int

_LARGEST_BATCH = 2**32  # bytes
_PAGE = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/"


class _SparseRows(NamedTuple):
    """Rows of a sparse matrix, padded to the longest.

    Attributes:
        columns: (rows, longest) int64; 0 in the padding.
        values: (rows, longest) float32; 0 in the padding.
        y: as in the batches.
    """

    columns: Tensor
    values: Tensor
    y: Tensor


class LibSVMDataModule(TensorDataModule):
    """Examples from files in LIBSVM's format ``label index:value index:value ...``; ``.gz`` and ``.bz2`` are read too.

    Batches are :class:`~lit_methods.batches.SupervisedBatch`: ``x`` float32 ``(batch, num_features)``, dense, made
    from the sparse rows batch by batch; ``y`` by ``task``. Without ``test_file``, ``test_size`` examples drawn by
    ``seed`` are held out.

    LIBSVM publishes no checksums, so nothing is downloaded: fetch the file from its page and pass its path.

    Args:
        train_file: path of the file.
        test_file: path of a second file, or None.
        task: "binary": ``y`` float32 ``(batch, 1)``, 1 for the greater of two labels; "multiclass": ``y`` int64
            ``(batch,)``, the place of the label among those of ``train_file``, in order; "regression": ``y`` float32
            ``(batch, 1)``, the label.
        num_features: number of columns, >= 1; None: the greatest index in the training file.
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the split and of the sample order, >= 0.
        val_size: number of examples held out for validation, >= 0.
        test_size: number of examples held out for the test where there is no ``test_file``, >= 0.

    Raises:
        ValueError: for an argument out of range, a file that is no such file, numbers that are not finite, labels that
            do not fit ``task``, or so many columns that a dense batch would take more than 4 GiB.
        FileNotFoundError: says which file is missing and where to get it.
    """

    def __init__(
        self,
        train_file: str,
        test_file: str | None = None,
        task: Literal["binary", "multiclass", "regression"] = "binary",
        num_features: int | None = None,
        batch_size: int = 125,
        num_workers: int = 0,
        seed: int = 0,
        val_size: int = 0,
        test_size: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, transform=self._dense)
        if task not in ("binary", "multiclass", "regression"):
            raise ValueError(f"Invalid task={task!r}: must be 'binary', 'multiclass' or 'regression'.")
        self.train_file = train_file
        self.test_file = test_file
        self.task = task
        self.num_features = None if num_features is None else check_int("num_features", num_features, 1)
        self.val_size = check_int("val_size", val_size, 0)
        self.test_size = check_int("test_size", test_size, 0)

    def setup(self, stage: str) -> None:
        """Read the files and hold examples out."""
        rows, labels, self.num_features = _read(self.train_file, self.num_features)
        if 4 * self.batch_size * self.num_features > _LARGEST_BATCH:
            raise ValueError(
                f"{self.train_file} has {self.num_features} columns, and batches are dense: one of "
                f"batch_size={self.batch_size} would take {4 * self.batch_size * self.num_features / 2**30:.0f} GiB, "
                "and must take <= 4 GiB"
            )
        classes = np.unique(labels)
        rows = rows._replace(y=self._targets(labels, classes))
        test_size = 0 if self.test_file else self.test_size
        left = len(labels) - self.val_size - test_size
        if left < 1:
            raise ValueError(
                f"Invalid val_size={self.val_size!r} and test_size={test_size!r}: {self.train_file} has {len(labels)} "
                "examples, and one must be left for training."
            )
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        parts = order.split([left, self.val_size, test_size])
        self.train_data, self.val_data, self.test_data = (_SparseRows(*(t[i] for t in rows)) for i in parts)
        if self.test_file:
            rows, labels, _ = _read(self.test_file, self.num_features)
            self.test_data = rows._replace(y=self._targets(labels, classes))

    def _targets(self, labels: np.ndarray, classes: np.ndarray) -> Tensor:
        if self.task == "regression":
            return torch.from_numpy(labels).float()[:, None]
        if unknown := set(np.unique(labels)) - set(classes):
            raise ValueError(f"{self.test_file} has labels that {self.train_file} lacks: {sorted(unknown)}.")
        if self.task == "binary" and len(classes) != 2:
            raise ValueError(f"task='binary' needs two labels, {self.train_file} has {len(classes)}: {classes[:10]}.")
        places = torch.from_numpy(np.searchsorted(classes, labels))
        return places.float()[:, None] if self.task == "binary" else places

    def _dense(self, batch: _SparseRows) -> SupervisedBatch:
        assert self.num_features is not None
        x = torch.zeros(len(batch.y), self.num_features).scatter_add_(1, batch.columns, batch.values)
        return SupervisedBatch(x, batch.y)


def _read(file: str, num_features: int | None) -> tuple[_SparseRows, np.ndarray, int]:
    """Rows without targets, labels, and the number of columns."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"LibSVMDataModule lacks {path.absolute()}. Get a file in LIBSVM's format, for example binary/mushrooms, "
            f"binary/ijcnn1.tr.bz2 or binary/rcv1_train.binary.bz2 from {_PAGE}, and pass its path "
            "(LIBSVM publishes no checksums, so nothing is downloaded unasked)."
        )
    kind = "in LIBSVM's format, or has more columns than num_features"
    with reading(path, kind), open_unpacked(path) as unpacked:
        matrix, labels = load_svmlight_file(unpacked, n_features=num_features, dtype=np.float32)
    bad = np.searchsorted(matrix.indptr, np.flatnonzero(~np.isfinite(matrix.data)), side="right") - 1
    if len(bad := np.union1d(bad, np.flatnonzero(~np.isfinite(labels)))):
        raise ValueError(f"{path}: labels and values must be finite; they are not in example {bad[0] + 1}")
    lengths = torch.from_numpy(np.diff(matrix.indptr)).long()
    filled = torch.arange(int(lengths.max())) < lengths[:, None]
    columns, values = torch.zeros(filled.shape, dtype=torch.int64), torch.zeros(filled.shape)
    columns[filled], values[filled] = torch.from_numpy(matrix.indices).long(), torch.from_numpy(matrix.data)
    return _SparseRows(columns, values, torch.empty(0)), labels, matrix.shape[1]
