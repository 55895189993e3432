"""MNIST and Fashion-MNIST from their four IDX files, without torchvision."""

import math
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules.download import fetch
from lit_methods.datamodules.reading import open_unpacked, reading
from lit_methods.datamodules.tensors import TensorDataModule, check_int, check_range

_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


class MNISTDataModule(TensorDataModule):
    """MNIST: 60000 + 10000 grey images of handwritten digits, 28x28 pixels, ten classes (LeCun et al., 1998).

    Batches are :class:`~lit_methods.batches.SupervisedBatch`: ``x`` float32 ``(batch, 1, 28, 28)`` in [0, 1], ``y``
    int64 ``(batch,)`` in 0..9. The test images are the official ones; ``val_size`` training images, drawn by ``seed``,
    are held out for validation.

    The four ``.gz`` files are taken from ``data_dir`` as they are, else downloaded there by :meth:`prepare_data` (rank
    zero; checked against the published MD5 sums; an interrupted download carries on).

    Args:
        data_dir: folder with the four files.
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the validation split and of the sample order, >= 0.
        val_size: number of validation images taken from the training set, >= 0 (0: no validation).
        value_range: what black and white become; models of images want (-1, 1).

    Raises:
        ValueError: for an argument out of range, or a file that is damaged or not what its name says.
        FileNotFoundError: when files are missing and cannot be downloaded; says which, where, and how to get them.
    """

    num_classes = 10

    mirrors: ClassVar[tuple[str, ...]] = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    )
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    }
    system_dir: ClassVar[Path | None] = None
    """Where the operating system's package puts the files."""
    system_package: ClassVar[str] = ""

    def __init__(
        self,
        data_dir: str = "data/mnist",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        val_size: int = 5000,
        value_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        to_floats = partial(_to_floats, value_range=check_range("value_range", value_range))
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, transform=to_floats)
        self.data_dir = data_dir
        self.val_size = check_int("val_size", val_size, 0)

    def prepare_data(self) -> None:
        """Download the missing files into ``data_dir``."""
        for name in self._missing():
            try:
                fetch([mirror + name for mirror in self.mirrors], Path(self.data_dir) / name, self.md5[name])
            except OSError as error:
                raise FileNotFoundError(self._how_to_get_files(f"\nThe download failed: {error}")) from error

    def setup(self, stage: str) -> None:
        """Read the files and hold out the validation images."""
        if self._missing():
            raise FileNotFoundError(self._how_to_get_files())
        x, y = self._read("train")
        if self.val_size >= len(x):
            raise ValueError(f"Invalid val_size={self.val_size!r}: must be in [0, {len(x) - 1}] for {len(x)} images.")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        train, val = order.split([len(x) - self.val_size, self.val_size])
        self.train_data = SupervisedBatch(x[train], y[train])
        self.val_data = SupervisedBatch(x[val], y[val])
        self.test_data = self._read("test")

    def _read(self, split: str) -> SupervisedBatch:
        """Return images, uint8 ``(n, 1, 28, 28)`` as stored, and labels, int64 ``(n,)``."""
        image_file, label_file = (self._find(name) for name in _FILES[split])
        x, y = read_idx(image_file), read_idx(label_file)
        if x.ndim != 3 or x.shape[1:] != (28, 28) or len(x) == 0:
            raise ValueError(f"{image_file} holds an array of shape {tuple(x.shape)}; expected (n >= 1, 28, 28).")
        if y.shape != x.shape[:1]:
            raise ValueError(
                f"{label_file} holds an array of shape {tuple(y.shape)}; expected ({len(x)},) for the images in "
                f"{image_file.name}."
            )
        if int(y.max()) >= self.num_classes:
            raise ValueError(f"{label_file} holds the label {int(y.max())}; expected 0..{self.num_classes - 1}.")
        return SupervisedBatch(x.unsqueeze(1), y.long())

    def _find(self, name: str) -> Path:
        """Return where file ``name`` is: in ``data_dir``, else in the system's folder, else where it should be."""
        own = Path(self.data_dir) / name
        if not own.exists() and self.system_dir is not None and (self.system_dir / name).exists():
            return self.system_dir / name
        return own

    def _missing(self) -> list[str]:
        return [name for names in _FILES.values() for name in names if not self._find(name).exists()]

    def _how_to_get_files(self, reason: str = "") -> str:
        files = "".join(f"\n  {self.mirrors[0]}{name}" for name in self._missing())
        package = f" Or install the Debian package {self.system_package}." if self.system_package else ""
        return (
            f"{type(self).__name__} lacks files in {Path(self.data_dir).absolute()}. "
            f"Download them there yourself:{files}\nOr pass data_dir=<the folder that holds them>.{package}{reason}"
        )


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST: 60000 + 10000 grey images of clothing, 28x28 pixels, ten classes (Xiao et al., 2017).

    Everything is as in :class:`MNISTDataModule`, and when ``data_dir`` lacks a file, it is taken from where Debian's
    package ``dataset-fashion-mnist`` puts it before anything is downloaded.

    Args:
        data_dir: folder with the four files.
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the validation split and of the sample order, >= 0.
        val_size: number of validation images taken from the training set, >= 0 (0: no validation).
        value_range: what black and white become; models of images want (-1, 1).

    Raises:
        ValueError: for an argument out of range, or a file that is damaged or not what its name says.
        FileNotFoundError: when files are missing and cannot be downloaded; says which, where, and how to get them.
    """

    mirrors: ClassVar[tuple[str, ...]] = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }
    system_dir: ClassVar[Path | None] = Path("/usr/share/datasets/fashion-mnist")
    system_package: ClassVar[str] = "dataset-fashion-mnist"

    def __init__(
        self,
        data_dir: str = "data/fashion_mnist",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        val_size: int = 5000,
        value_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(data_dir, batch_size, num_workers, seed, val_size, value_range)


class KMNISTDataModule(MNISTDataModule):
    """KMNIST: 60000 + 10000 grey images of cursive Japanese characters, 28x28 pixels, ten classes.

    Clanuwat et al., *Deep Learning for Classical Japanese Literature*, 2018 (arXiv 1812.01718). Everything is as in
    :class:`MNISTDataModule`.

    Args:
        data_dir: folder with the four files.
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the validation split and of the sample order, >= 0.
        val_size: number of validation images taken from the training set, >= 0 (0: no validation).
        value_range: what black and white become; models of images want (-1, 1).

    Raises:
        ValueError: for an argument out of range, or a file that is damaged or not what its name says.
        FileNotFoundError: when files are missing and cannot be downloaded; says which, where, and how to get them.
    """

    mirrors: ClassVar[tuple[str, ...]] = ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",)
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    }

    def __init__(
        self,
        data_dir: str = "data/kmnist",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        val_size: int = 5000,
        value_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(data_dir, batch_size, num_workers, seed, val_size, value_range)


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of unsigned bytes.

    The format is two zero bytes, a type byte (8: unsigned byte), the number of dimensions, one big-endian 32-bit size
    per dimension, then the bytes in row-major order.

    Returns:
        A uint8 tensor of the shape that the header gives.

    Raises:
        ValueError: naming the file, when it is not gzip, not IDX, not of bytes, or longer or shorter than it says.
    """
    with reading(path, "a gzip file"), open_unpacked(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {content[:4].hex()!r}.")
    header = 4 + 4 * content[3]
    shape = np.frombuffer(content, ">u4", content[3], 4).tolist() if len(content) >= header else []
    if len(content) < header or len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path} is damaged: {len(content)} bytes after unpacking, {header + math.prod(shape)} expected for an "
            f"array of shape {tuple(shape)}. Delete it and fetch it again."
        )
    return torch.tensor(np.frombuffer(content, np.uint8)[header:].reshape(shape))


def _to_floats(batch: SupervisedBatch, value_range: tuple[float, float]) -> SupervisedBatch:
    low, high = value_range
    x = batch.x.float().div_(255)
    return SupervisedBatch(x if (low, high) == (0, 1) else x.mul_(high - low).add_(low), batch.y)
