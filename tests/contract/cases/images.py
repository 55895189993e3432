"""Cases of the family: images."""

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from lit_methods.datamodules import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    KMNISTDataModule,
    MNISTDataModule,
)
from tests.contract.cases.kinds import LOADER_ARGUMENTS, Arguments, DataModuleCase
from tests.standins.cifar_files import write_cifar
from tests.standins.idx_files import write_mnist


def _mnist(datamodule: type[LightningDataModule], folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_mnist(folder)
    return datamodule(**({"data_dir": str(folder), "batch_size": 4, "val_size": 8} | arguments))


def _cifar(datamodule: type[CIFAR10DataModule], folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_cifar(folder, datamodule)
    return datamodule(**({"data_dir": str(folder), "batch_size": 4, "val_size": 8} | arguments))


_CIFAR_ARGUMENTS: list[tuple[Arguments, str]] = [
    *LOADER_ARGUMENTS,
    ({"mean": (0.5,)}, "mean=.*three numbers"),
    ({"std": (1.0, 0.0, 1.0)}, "std=.*three numbers > 0"),
]

_RANGE: tuple[Arguments, str] = ({"value_range": (1.0, -1.0)}, "value_range=.*: must be two rising")

DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.CIFAR10DataModule": DataModuleCase(
        partial(_cifar, CIFAR10DataModule), bad=_CIFAR_ARGUMENTS
    ),
    "lit_methods.datamodules.CIFAR100DataModule": DataModuleCase(
        partial(_cifar, CIFAR100DataModule), bad=[*_CIFAR_ARGUMENTS, ({"label": "medium"}, "label='medium'")]
    ),
    "lit_methods.datamodules.DigitsDataModule": DataModuleCase(
        lambda folder, **arguments: DigitsDataModule(**arguments),
        bad=[*LOADER_ARGUMENTS, ({"test_size": 1797}, "test_size=1797: must be"), _RANGE],
    ),
    "lit_methods.datamodules.KMNISTDataModule": DataModuleCase(
        partial(_mnist, KMNISTDataModule), bad=[*LOADER_ARGUMENTS, _RANGE]
    ),
    "lit_methods.datamodules.FashionMNISTDataModule": DataModuleCase(
        partial(_mnist, FashionMNISTDataModule), bad=[*LOADER_ARGUMENTS, _RANGE]
    ),
    "lit_methods.datamodules.MNISTDataModule": DataModuleCase(
        partial(_mnist, MNISTDataModule), bad=[*LOADER_ARGUMENTS, _RANGE]
    ),
}
