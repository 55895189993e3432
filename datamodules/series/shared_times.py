"""Rows of series that share their times."""

from torch import Tensor

from lit_methods.batches import PathBatch


def path_rows(times: Tensor, values: Tensor, mask: Tensor) -> PathBatch:
    """All rows, each with the times (without copies): loaders take rows of every tensor."""
    return PathBatch(times.expand(len(values), -1), values, mask)


def one_grid(batch: PathBatch) -> PathBatch:
    """A fetched batch with the times once."""
    return batch._replace(times=batch.times[0])
