"""Batch contracts: the NamedTuples that methods and datamodules share."""

from typing import NamedTuple

from torch import Tensor


class SupervisedBatch(NamedTuple):
    """One mini-batch of labelled examples; unpacks as ``x, y = batch``.

    Attributes:
        x: inputs, ``(batch, ...)``, floating point. Image datamodules give ``(batch, channels, height, width)``.
        y: targets: ``(batch,)`` int64 class indices, or ``(batch, ...)`` floating point values for regression.
    """

    x: Tensor
    y: Tensor
