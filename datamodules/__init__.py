"""Lightning datamodules. They know no method: batches follow the contracts of ``lit_methods.batches``."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
    from lit_methods.datamodules.digits import DigitsDataModule
    from lit_methods.datamodules.glue import GLUEDataModule
    from lit_methods.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
    from lit_methods.datamodules.tensors import TensorDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "GLUEDataModule",
    "MNISTDataModule",
    "TensorDataModule",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CIFAR10DataModule": "cifar",
        "CIFAR100DataModule": "cifar",
        "DigitsDataModule": "digits",
        "FashionMNISTDataModule": "mnist",
        "GLUEDataModule": "glue",
        "MNISTDataModule": "mnist",
        "TensorDataModule": "tensors",
    },
)
