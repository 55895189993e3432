"""Images."""

from lit_methods.datamodules.images.arrays import ArrayFilesDataModule
from lit_methods.datamodules.images.cifar import CIFAR10DataModule, CIFAR100DataModule
from lit_methods.datamodules.images.digit_points import DigitPointsDataModule
from lit_methods.datamodules.images.digits import DigitsDataModule
from lit_methods.datamodules.images.mnist import FashionMNISTDataModule, KMNISTDataModule, MNISTDataModule
from lit_methods.datamodules.images.scenes import DigitScenesDataModule, MultiMNISTDataModule

__all__ = [
    "ArrayFilesDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitPointsDataModule",
    "DigitScenesDataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "KMNISTDataModule",
    "MNISTDataModule",
    "MultiMNISTDataModule",
]
