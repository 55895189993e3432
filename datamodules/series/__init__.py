"""Time series, as :class:`~lit_methods.batches.PathBatch`."""

from lit_methods.datamodules.series.bridge import BridgeDataModule
from lit_methods.datamodules.series.fractional_paths import FractionalPathDataModule
from lit_methods.datamodules.series.moving_digits import MovingDigitsDataModule
from lit_methods.datamodules.series.stock_volatility import StockVolatilityDataModule

__all__ = [
    "BridgeDataModule",
    "FractionalPathDataModule",
    "MovingDigitsDataModule",
    "StockVolatilityDataModule",
]
