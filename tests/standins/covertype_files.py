"""A small data set in the format of UCI's ``covtype.data.gz``."""

from pathlib import Path

import numpy as np


def write_covertype(folder: Path, rows: int = 200) -> None:
    """Write ``rows`` places whose cover type is 2 where the first column is above its mean."""
    rng = np.random.default_rng(0)
    x = rng.integers(-1000, 1000, (rows, 54))
    x[:, 53] = 0  # a column without spread, as some of the soil types nearly are
    y = np.where(x[:, 0] > x[:, 0].mean(), 2, 5)
    folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(folder / "covtype.data.gz", np.column_stack([x, y]), fmt="%d", delimiter=",")
