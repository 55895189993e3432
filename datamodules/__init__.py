"""Lightning datamodules. They know no method: batches follow the contracts of ``lit_methods.batches``."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
    from lit_methods.datamodules.digits import DigitsDataModule
    from lit_methods.datamodules.glue import GLUEDataModule
    from lit_methods.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
    from lit_methods.datamodules.prompts import PromptDataModule
    from lit_methods.datamodules.replay import ReplayDataModule
    from lit_methods.datamodules.rollouts import RolloutDataModule
    from lit_methods.datamodules.sensing import SensingDataModule
    from lit_methods.datamodules.tensors import TensorDataModule
    from lit_methods.datamodules.word_game import WordGameDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "GLUEDataModule",
    "MNISTDataModule",
    "PromptDataModule",
    "ReplayDataModule",
    "RolloutDataModule",
    "SensingDataModule",
    "TensorDataModule",
    "WordGameDataModule",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CIFAR100DataModule": "cifar",
        "CIFAR10DataModule": "cifar",
        "DigitsDataModule": "digits",
        "FashionMNISTDataModule": "mnist",
        "GLUEDataModule": "glue",
        "MNISTDataModule": "mnist",
        "PromptDataModule": "prompts",
        "ReplayDataModule": "replay",
        "RolloutDataModule": "rollouts",
        "SensingDataModule": "sensing",
        "TensorDataModule": "tensors",
        "WordGameDataModule": "word_game",
    },
)
