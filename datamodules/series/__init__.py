"""Time series."""

from lit_methods.datamodules.series.arrays import TimeSeriesDataModule
from lit_methods.datamodules.series.machines import PrimitiveSwitchDataModule, SinesDataModule, SymbolicMarkovDataModule

__all__ = ["PrimitiveSwitchDataModule", "SinesDataModule", "SymbolicMarkovDataModule", "TimeSeriesDataModule"]
