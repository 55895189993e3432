"""Time series."""

from lit_methods.datamodules.series.arrays import TimeSeriesDataModule
from lit_methods.datamodules.series.bridge import BridgeDataModule
from lit_methods.datamodules.series.fractional_paths import FractionalPathDataModule
from lit_methods.datamodules.series.machines import PrimitiveSwitchDataModule, SinesDataModule, SymbolicMarkovDataModule
from lit_methods.datamodules.series.moving_digits import MovingDigitsDataModule
from lit_methods.datamodules.series.stock_volatility import StockVolatilityDataModule

__all__ = [
    "BridgeDataModule",
    "FractionalPathDataModule",
    "MovingDigitsDataModule",
    "PrimitiveSwitchDataModule",
    "SinesDataModule",
    "StockVolatilityDataModule",
    "SymbolicMarkovDataModule",
    "TimeSeriesDataModule",
]
