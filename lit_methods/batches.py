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


class TokenBatch(NamedTuple):
    """One mini-batch of tokenised texts or pairs of texts, padded on the right to the longest row of the batch.

    Attributes:
        input_ids: ``(batch, length)`` int64, tokens with the tokenizer's special ones.
        attention_mask: ``(batch, length)`` int64, 1 at tokens and 0 at padding.
        token_type_ids: ``(batch, length)`` int64, 0 in the first text and 1 in the second where the tokenizer tells
            them apart, else 0.
        labels: ``(batch,)`` int64 class indices or float32 values; -1 where the label is not known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor
