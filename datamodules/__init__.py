"""Lightning datamodules. They know no method: batches follow the contracts of ``lit_methods.batches``."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.datamodules.breast_cancer import BreastCancerDataModule
    from lit_methods.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
    from lit_methods.datamodules.covertype import CovertypeDataModule
    from lit_methods.datamodules.d4rl import D4RLDataModule
    from lit_methods.datamodules.digit_points import DigitPointsDataModule
    from lit_methods.datamodules.digits import DigitsDataModule
    from lit_methods.datamodules.glue import GLUEDataModule
    from lit_methods.datamodules.imitation import ImitationDataModule
    from lit_methods.datamodules.interaction_sets import (
        MovieLensDataModule,
        MSDTasteProfileDataModule,
        NetflixPrizeDataModule,
    )
    from lit_methods.datamodules.interactions import InteractionsDataModule
    from lit_methods.datamodules.libsvm import LibSVMDataModule
    from lit_methods.datamodules.matrix_factorization import MatrixFactorizationDataModule
    from lit_methods.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
    from lit_methods.datamodules.prompts import PromptDataModule
    from lit_methods.datamodules.recordings import save_minari, save_transitions_hdf5
    from lit_methods.datamodules.replay import ReplayDataModule
    from lit_methods.datamodules.rollouts import RolloutDataModule
    from lit_methods.datamodules.sea import DriftingDigitsDataModule, SEADataModule
    from lit_methods.datamodules.sensing import SensingDataModule
    from lit_methods.datamodules.tensors import TensorDataModule
    from lit_methods.datamodules.word_game import WordGameDataModule

__all__ = [
    "BreastCancerDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CovertypeDataModule",
    "D4RLDataModule",
    "DigitPointsDataModule",
    "DigitsDataModule",
    "DriftingDigitsDataModule",
    "FashionMNISTDataModule",
    "GLUEDataModule",
    "ImitationDataModule",
    "InteractionsDataModule",
    "LibSVMDataModule",
    "MNISTDataModule",
    "MSDTasteProfileDataModule",
    "MatrixFactorizationDataModule",
    "MovieLensDataModule",
    "NetflixPrizeDataModule",
    "PromptDataModule",
    "ReplayDataModule",
    "RolloutDataModule",
    "SEADataModule",
    "SensingDataModule",
    "TensorDataModule",
    "WordGameDataModule",
    "save_minari",
    "save_transitions_hdf5",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "BreastCancerDataModule": "breast_cancer",
        "CIFAR100DataModule": "cifar",
        "CIFAR10DataModule": "cifar",
        "CovertypeDataModule": "covertype",
        "D4RLDataModule": "d4rl",
        "DigitPointsDataModule": "digit_points",
        "DigitsDataModule": "digits",
        "DriftingDigitsDataModule": "sea",
        "FashionMNISTDataModule": "mnist",
        "GLUEDataModule": "glue",
        "ImitationDataModule": "imitation",
        "InteractionsDataModule": "interactions",
        "LibSVMDataModule": "libsvm",
        "MNISTDataModule": "mnist",
        "MatrixFactorizationDataModule": "matrix_factorization",
        "MSDTasteProfileDataModule": "interaction_sets",
        "MovieLensDataModule": "interaction_sets",
        "NetflixPrizeDataModule": "interaction_sets",
        "PromptDataModule": "prompts",
        "ReplayDataModule": "replay",
        "RolloutDataModule": "rollouts",
        "SEADataModule": "sea",
        "SensingDataModule": "sensing",
        "TensorDataModule": "tensors",
        "WordGameDataModule": "word_game",
        "save_minari": "recordings",
        "save_transitions_hdf5": "recordings",
    },
)
