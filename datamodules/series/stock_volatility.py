"""A real series whose noise is rough: the volatility of a share."""

from pathlib import Path

import matplotlib
import numpy as np
import torch

from lit_methods.datamodules.series.shared_times import one_grid, path_rows
from lit_methods.datamodules.tensors import TensorDataModule, check_int

_LOG_RANGE_STD = 0.29  # of log(high / low) around the day's log volatility, if prices are a Brownian motion within it


class StockVolatilityDataModule(TensorDataModule):
    """Daily log volatility of Google's share, 1047 trading days from August 2004 to October 2008; real data.

    It is the logarithm of Parkinson's (1980) estimate from each day's highest and lowest price, in the file
    ``goog.npz`` that matplotlib ships as sample data, so nothing is fetched. It measures the volatility with an error
    of standard deviation 0.29 if prices move as a Brownian motion within a day.

    Rows are windows of ``window`` calendar days; times are days since the window's start over ``window``, so that they
    lie in [0, 1), and days without trade are holes: irregular sampling as it comes. Values are standardised by mean
    and deviation of the training days. Windows are in the order of time, training first, and do not overlap between
    the splits. Batches are :class:`~lit_methods.batches.PathBatch` with values float32 ``(batch, window, 1)``.

    Args:
        window: calendar days per row, >= 8.
        stride: calendar days between starts of training windows, >= 1.
        batch_size: windows per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: of the order, >= 0.

    Attributes:
        series: log volatility of every calendar day, NaN without trade, float64 ``(days,)``.
        obs_std: the standard deviation of its error, in standardised units, once :meth:`setup` has run.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, window: int = 64, stride: int = 7, batch_size: int = 32, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, transform=one_grid)
        self.window = check_int("window", window, 8, 200)
        self.stride = check_int("stride", stride, 1)

    def setup(self, stage: str) -> None:
        """Read the prices and cut the windows."""
        path = Path(matplotlib.get_data_path()) / "sample_data" / "goog.npz"
        prices = np.load(path, allow_pickle=False)["price_data"]
        days = (prices["date"] - prices["date"][0]).astype(int)
        volatility = np.log(np.log(prices["high"] / prices["low"]) / (2 * np.log(2) ** 0.5))
        self.series = torch.full((int(days[-1]) + 1,), torch.nan, dtype=torch.float64)
        self.series[torch.from_numpy(days)] = torch.from_numpy(volatility)
        val_start, test_start = (int(share * len(self.series)) for share in (0.7, 0.85))
        seen = self.series[:val_start][~self.series[:val_start].isnan()]
        self.mean, self.std = seen.mean(), seen.std()
        self.obs_std = float(_LOG_RANGE_STD / self.std)
        self.train_data = self._windows(0, val_start, self.stride)
        self.val_data = self._windows(val_start, test_start, self.window)
        self.test_data = self._windows(test_start, len(self.series), self.window)

    def _windows(self, start: int, stop: int, stride: int) -> tuple[torch.Tensor, ...]:
        rows = self.series[start:stop].unfold(0, self.window, stride)
        values = ((rows - self.mean) / self.std).float()[..., None]
        return path_rows(torch.arange(self.window) / self.window, values, ~rows.isnan())
