"""CIFAR-10 and CIFAR-100 from the binary version of their official archives, without torchvision."""

import tarfile
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules.download import fetch
from lit_methods.datamodules.reading import open_unpacked, reading
from lit_methods.datamodules.tensors import TensorDataModule, check_int

_SITE = "https://www.cs.toronto.edu/~kriz/"
_SHAPE = (3, 32, 32)

Channels = tuple[float, float, float]


class CIFAR10DataModule(TensorDataModule):
    """CIFAR-10: 50000 + 10000 colour images of 32x32 pixels, ten classes (Krizhevsky, 2009).

    Batches are :class:`~lit_methods.batches.SupervisedBatch`: ``x`` float32 ``(batch, 3, 32, 32)``, red, green and blue
    in [0, 1] minus ``mean`` over ``std``; ``y`` int64 ``(batch,)``. The test images are the official ones; ``val_size``
    training images, drawn by ``seed``, are held out for validation.

    With ``augment``, a Trainer's training batches go through :func:`random_crop_and_flip` on the batch's device. It
    draws from the global generator of that device, which :class:`lit_methods.callbacks.ExactResume` saves.

    The archive (or the folder that it unpacks to) is taken from ``data_dir``, else downloaded there by
    :meth:`prepare_data` (rank zero; checked against the published MD5; an interrupted download carries on). It is read
    without unpacking, by the names of its members, and holds numbers only.

    Args:
        data_dir: folder with the archive, or with the unpacked folder, or the unpacked folder itself.
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the validation split and of the sample order, >= 0.
        val_size: number of validation images taken from the training set, >= 0 (0: no validation).
        augment: crop and flip training images at random.
        mean: what is subtracted from red, green and blue; default: the training pixels' mean.
        std: positive numbers that red, green and blue are divided by; default: the training pixels' standard deviation.
            (The 0.2023, 0.1994, 0.2010 of much published code is the mean of each image's own standard deviation.)

    Raises:
        ValueError: for an argument out of range, or a file that is damaged or not what its name says.
        FileNotFoundError: when files are missing and cannot be downloaded; says which, where, and how to get them.
    """

    num_classes = 10

    mirrors: ClassVar[tuple[str, ...]] = (_SITE,)
    archive: ClassVar[str] = "cifar-10-binary.tar.gz"
    md5: ClassVar[str] = "c32a1d4ab5d03f1284b67883e8d87530"
    folder: ClassVar[str] = "cifar-10-batches-bin"
    """The folder in the archive."""
    files: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test": ("test_batch.bin",),
    }
    label_bytes: ClassVar[int] = 1
    """Labels in front of each image."""

    def __init__(
        self,
        data_dir: str = "data/cifar10",
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        val_size: int = 5000,
        augment: bool = True,
        mean: Channels = (0.4914, 0.4822, 0.4465),
        std: Channels = (0.2470, 0.2435, 0.2616),
    ) -> None:
        if len(mean) != 3:
            raise ValueError(f"Invalid mean={mean!r}: must be three numbers.")
        if len(std) != 3 or min(std) <= 0:
            raise ValueError(f"Invalid std={std!r}: must be three numbers > 0.")
        mean_, std_ = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
        normalize = partial(_normalize, mean=mean_, std=std_)
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, transform=normalize)
        self.data_dir = data_dir
        self.val_size = check_int("val_size", val_size, 0)
        self.augment = augment
        self._label = 0  # which of the label bytes is the label
        self._black = -mean_ / std_

    def prepare_data(self) -> None:
        """Download the archive into ``data_dir`` unless the images are there."""
        if self._missing():
            path = Path(self.data_dir) / self.archive
            try:
                fetch([mirror + self.archive for mirror in self.mirrors], path, self.md5)
            except OSError as error:
                raise FileNotFoundError(self._how_to_get_files(f"\nThe download failed: {error}")) from error

    def setup(self, stage: str) -> None:
        """Read the images once and hold out those for validation."""
        if self.test_data is not None:
            return
        if self._missing():
            raise FileNotFoundError(self._how_to_get_files())
        contents = self._read()
        x, y = self._parse("train", contents)
        if self.val_size >= len(x):
            raise ValueError(f"Invalid val_size={self.val_size!r}: must be in [0, {len(x) - 1}] for {len(x)} images.")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        train, val = order.split([len(x) - self.val_size, self.val_size])
        self.train_data = SupervisedBatch(x[train], y[train])
        self.val_data = SupervisedBatch(x[val], y[val])
        self.test_data = self._parse("test", contents)

    def on_after_batch_transfer(self, batch: SupervisedBatch, dataloader_idx: int) -> SupervisedBatch:
        """Augment a training batch on its device."""
        if not self.augment or self.trainer is None or not self.trainer.training:
            return batch
        self._black = self._black.to(batch.x)
        return SupervisedBatch(random_crop_and_flip(batch.x, self._black), batch.y)

    def _names(self) -> list[str]:
        return [name for names in self.files.values() for name in names]

    def _unpacked(self) -> Path | None:
        """Return the folder that holds every file, if there is one."""
        folders = (Path(self.data_dir) / self.folder, Path(self.data_dir))
        return next((folder for folder in folders if all((folder / name).is_file() for name in self._names())), None)

    def _missing(self) -> bool:
        return self._unpacked() is None and not (Path(self.data_dir) / self.archive).is_file()

    def _read(self) -> dict[str, tuple[str, bytes]]:
        """Return file name -> (where it is, for messages; its content)."""
        if (folder := self._unpacked()) is not None:
            return {name: (str(folder / name), (folder / name).read_bytes()) for name in self._names()}
        path = Path(self.data_dir) / self.archive
        wanted = {f"{self.folder}/{name}": name for name in self._names()}
        contents = {}
        with (
            reading(path, "a gzipped tar file"),
            open_unpacked(path) as unzipped,
            tarfile.open(fileobj=unzipped, mode="r|") as tar,
        ):
            for member in tar:
                name = wanted.get(member.name.removeprefix("./"))
                if name is not None and member.isreg():
                    file = tar.extractfile(member)
                    assert file is not None
                    contents[name] = (f"{path}:{member.name}", file.read())
            while unzipped.read(1 << 20):  # gzip's checksum comes last, and tarfile stops before it
                pass
        if lacking := sorted(set(self._names()) - set(contents)):
            raise ValueError(f"{path} does not hold {', '.join(lacking)} in {self.folder}: is it the binary version?")
        return contents

    def _parse(self, split: str, contents: dict[str, tuple[str, bytes]]) -> SupervisedBatch:
        """Return images, uint8 ``(n, 3, 32, 32)`` as stored, and labels, int64 ``(n,)``."""
        images, labels = [], []
        record = self.label_bytes + 3 * 32 * 32
        for name in self.files[split]:
            where, content = contents[name]
            if len(content) == 0 or len(content) % record:
                raise ValueError(f"{where} is damaged: {len(content)} bytes, not a multiple (>= 1) of {record}.")
            rows = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, record).copy())
            label = rows[:, self._label]
            if int(label.max()) >= self.num_classes:
                raise ValueError(f"{where} holds the label {int(label.max())}; expected 0..{self.num_classes - 1}.")
            images.append(rows[:, self.label_bytes :].reshape(-1, *_SHAPE))
            labels.append(label.long())
        return SupervisedBatch(torch.cat(images), torch.cat(labels))

    def _how_to_get_files(self, reason: str = "") -> str:
        folder = Path(self.data_dir).absolute()
        return (
            f"{type(self).__name__} lacks its files in {folder}: {self.archive}, or the folder {self.folder} that it "
            f"unpacks to, with {', '.join(self._names())}. Download the archive there yourself:\n  "
            f"{self.mirrors[0]}{self.archive}\nOr pass data_dir=<the folder that holds either>.{reason}"
        )


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50000 + 10000 colour images of 32x32 pixels, 100 classes in 20 superclasses (Krizhevsky, 2009).

    Everything else is as in :class:`CIFAR10DataModule`.

    Args:
        data_dir: folder with the archive, or with the unpacked folder, or the unpacked folder itself.
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the validation split and of the sample order, >= 0.
        val_size: number of validation images taken from the training set, >= 0 (0: no validation).
        augment: crop and flip training images at random.
        mean: what is subtracted from red, green and blue; default: the training pixels' mean.
        std: positive numbers that red, green and blue are divided by; default: the training pixels' standard deviation.
        label: ``"fine"`` for the 100 classes, ``"coarse"`` for the 20 superclasses.

    Raises:
        ValueError: for an argument out of range, or a file that is damaged or not what its name says.
        FileNotFoundError: when files are missing and cannot be downloaded; says which, where, and how to get them.
    """

    archive: ClassVar[str] = "cifar-100-binary.tar.gz"
    md5: ClassVar[str] = "03b5dce01913d631647c71ecec9e9cb8"
    folder: ClassVar[str] = "cifar-100-binary"
    files: ClassVar[dict[str, tuple[str, ...]]] = {"train": ("train.bin",), "test": ("test.bin",)}
    label_bytes: ClassVar[int] = 2

    def __init__(
        self,
        data_dir: str = "data/cifar100",
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        val_size: int = 5000,
        augment: bool = True,
        mean: Channels = (0.5071, 0.4865, 0.4409),
        std: Channels = (0.2673, 0.2564, 0.2762),
        label: Literal["fine", "coarse"] = "fine",
    ) -> None:
        super().__init__(data_dir, batch_size, num_workers, seed, val_size, augment, mean, std)
        if label not in ("fine", "coarse"):
            raise ValueError(f"Invalid label={label!r}: must be 'fine' or 'coarse'.")
        self.num_classes = 100 if label == "fine" else 20
        self._label = 1 if label == "fine" else 0  # each record starts with the coarse label


def random_crop_and_flip(x: Tensor, fill: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by up to ``padding`` pixels, and mirror it from left to right with probability 1/2.

    The usual augmentation of CIFAR (He et al., 2016, arXiv 1512.03385, section 4.2): pad all sides, crop at a random
    place, flip. Each image has its own draws, from the global generator of the device of ``x``; the device is never
    waited for.

    Args:
        x: images, ``(batch, channels, height, width)``.
        fill: what to pad with, ``(channels, 1, 1)`` (black, after normalisation), on the device of ``x``.
        padding: number of pixels on each side, >= 0.

    Returns:
        Images of the shape and type of ``x``.
    """
    n, channels, height, width = x.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, n), device=x.device)
    flip = torch.rand(n, device=x.device) < 0.5
    padded = fill.expand(n, channels, height + 2 * padding, width + 2 * padding).clone()
    padded[..., padding : padding + height, padding : padding + width] = x
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: every crop of every image
    crops = windows[torch.arange(n, device=x.device), :, top, left]
    return torch.where(flip.view(n, 1, 1, 1), crops.flip(-1), crops)


def _normalize(batch: SupervisedBatch, mean: Tensor, std: Tensor) -> SupervisedBatch:
    return SupervisedBatch(batch.x.float().div_(255).sub_(mean).div_(std), batch.y)
