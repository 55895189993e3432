"""A small data set in the files that scikit-learn's ``fetch_covtype`` keeps."""

from pathlib import Path

import joblib
import numpy as np


def write_covertype(folder: Path, rows: int = 200) -> None:
    """Write ``rows`` places whose cover type is 2 where the first column is above its mean."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 54))
    x[:, 53] = 0  # a column without spread, as some of the soil types nearly are
    (folder / "covertype").mkdir(parents=True, exist_ok=True)
    joblib.dump(x, folder / "covertype" / "samples_py3")
    joblib.dump(np.where(x[:, 0] > x[:, 0].mean(), 2, 5).astype(np.int32), folder / "covertype" / "targets_py3")
