"""Lightning datamodules. They know no method: batches follow the contracts of ``lit_methods.batches``."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.datamodules.digits import DigitsDataModule
    from lit_methods.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
    from lit_methods.datamodules.prompts import PromptDataModule
    from lit_methods.datamodules.tensors import TensorDataModule
    from lit_methods.datamodules.word_game import WordGameDataModule

__all__ = [
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "MNISTDataModule",
    "PromptDataModule",
    "TensorDataModule",
    "WordGameDataModule",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "DigitsDataModule": "digits",
        "FashionMNISTDataModule": "mnist",
        "MNISTDataModule": "mnist",
        "PromptDataModule": "prompts",
        "TensorDataModule": "tensors",
        "WordGameDataModule": "word_game",
    },
)
