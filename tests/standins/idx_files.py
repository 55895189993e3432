"""Tiny files in the layout of MNIST."""

import gzip
import struct
from pathlib import Path

import numpy as np


def write_mnist(folder: Path, train: int = 40, test: int = 12) -> None:
    """Write the four files with random images into ``folder``."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", rng.integers(0, 10, count))


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write one gzipped IDX file of unsigned bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
