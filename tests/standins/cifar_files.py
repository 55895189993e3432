"""Tiny archives in the layout of CIFAR's binary version."""

import io
import tarfile
from pathlib import Path

import numpy as np

from lit_methods.datamodules import CIFAR10DataModule


def write_cifar(folder: Path, datamodule: type[CIFAR10DataModule], train: int = 40, test: int = 12) -> None:
    """Write the archive that ``datamodule`` reads, with random images, into ``folder``."""
    write_archive(folder / datamodule.archive, datamodule.folder, random_contents(datamodule, train, test))


def random_contents(datamodule: type[CIFAR10DataModule], train: int = 40, test: int = 12) -> dict[str, bytes]:
    """File name -> random labels and pixels; training images are shared out over the training files."""
    rng = np.random.default_rng(0)
    contents = {}
    for split, count in (("train", train), ("test", test)):
        names = datamodule.files[split]
        for name in names:
            n = count // len(names)
            labels = [rng.integers(0, classes, (n, 1)) for classes in ((10,), (20, 100))[datamodule.label_bytes - 1]]
            pixels = rng.integers(0, 256, (n, 3 * 32 * 32))
            contents[name] = np.concatenate([*labels, pixels], 1).astype(np.uint8).tobytes()
    return contents


def write_archive(path: Path, folder: str, contents: dict[str, bytes]) -> None:
    """Write a gzipped tar file with ``contents`` in ``folder``."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
