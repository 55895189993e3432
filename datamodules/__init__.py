"""Lightning datamodules. They know no method: batches follow the contracts of ``lit_methods.batches``."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.datamodules.digits import DigitsDataModule
    from lit_methods.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
    from lit_methods.datamodules.sensing import SensingDataModule
    from lit_methods.datamodules.tensors import TensorDataModule

__all__ = ["DigitsDataModule", "FashionMNISTDataModule", "MNISTDataModule", "SensingDataModule", "TensorDataModule"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "DigitsDataModule": "digits",
        "FashionMNISTDataModule": "mnist",
        "MNISTDataModule": "mnist",
        "SensingDataModule": "sensing",
        "TensorDataModule": "tensors",
    },
)
