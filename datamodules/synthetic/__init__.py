"""Data drawn from a formula."""

from lit_methods.datamodules.synthetic.gaussian_mixture import GaussianMixtureDataModule
from lit_methods.datamodules.synthetic.matrix_factorization import MatrixFactorizationDataModule
from lit_methods.datamodules.synthetic.mixture2d import Mixture2DDataModule
from lit_methods.datamodules.synthetic.online_streams import DriftingDigitsDataModule, SEADataModule
from lit_methods.datamodules.synthetic.repeated_observation import RepeatedObservationDataModule
from lit_methods.datamodules.synthetic.sensing import SensingDataModule
from lit_methods.datamodules.synthetic.sparse_teacher import SparseTeacherDataModule

__all__ = [
    "DriftingDigitsDataModule",
    "GaussianMixtureDataModule",
    "MatrixFactorizationDataModule",
    "Mixture2DDataModule",
    "RepeatedObservationDataModule",
    "SEADataModule",
    "SensingDataModule",
    "SparseTeacherDataModule",
]
