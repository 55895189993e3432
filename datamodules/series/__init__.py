"""Time series."""

from lit_methods.datamodules.series.arrays import TimeSeriesDataModule
from lit_methods.datamodules.series.machines import PrimitiveSwitchDataModule, SymbolicMarkovDataModule

__all__ = ["PrimitiveSwitchDataModule", "SymbolicMarkovDataModule", "TimeSeriesDataModule"]
