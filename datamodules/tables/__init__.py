"""Tables."""

from lit_methods.datamodules.tables.breast_cancer import BreastCancerDataModule
from lit_methods.datamodules.tables.covertype import CovertypeDataModule
from lit_methods.datamodules.tables.diabetes import DiabetesDataModule
from lit_methods.datamodules.tables.libsvm import LibSVMDataModule

__all__ = ["BreastCancerDataModule", "CovertypeDataModule", "DiabetesDataModule", "LibSVMDataModule"]
