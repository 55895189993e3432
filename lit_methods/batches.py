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


Prompt = str | list[dict[str, str]]
"""A plain text, or chat messages ``[{"role": ..., "content": ...}, ...]`` that end before the assistant's answer."""


class PromptBatch(NamedTuple):
    """One mini-batch of prompts for a language model, as text: methods own their tokenizer.

    Attributes:
        prompts: ``batch`` prompts, all plain texts or all chat messages.
        responses: ``batch`` wanted responses for supervised fine-tuning, or an empty list.
        rows: row of each prompt in its data set, ``(batch,)`` int64.
    """

    prompts: list[Prompt]
    responses: list[str]
    rows: Tensor


class SensingBatch(NamedTuple):
    """Linear measurements ``y_i = <A_i, M>`` of an unknown matrix ``M``, normalised to be isotropic.

    Isotropic means that ``mean_i <A_i, M>^2`` is about the squared Frobenius norm of ``M`` (of symmetric ``M``, when
    the ``A_i`` are symmetric), as with independent standard normal entries.

    Attributes:
        matrices: the ``A_i``, ``(batch, rows, columns)``, floating point.
        values: the ``y_i``, ``(batch,)``.
    """

    matrices: Tensor
    values: Tensor

    def measure(self, left: Tensor, right: Tensor) -> Tensor:
        """``<A_i, left right^T>``: factors ``(..., rows, k)`` and ``(..., columns, k)`` to ``(..., batch)``."""
        return (left @ right.mT).flatten(-2) @ self.matrices.flatten(1).mT


class EntriesBatch(NamedTuple):
    """Observed entries of an unknown ``(n1, n2)`` matrix ``M``; a :class:`SensingBatch` that stores indices only.

    Entry ``(i, j)`` stands for the measurement matrix ``sqrt(n1 n2) e_i e_j^T``, which makes uniformly drawn entries
    isotropic.

    Attributes:
        rows: row indices ``i``, int64 ``(batch,)``.
        columns: column indices ``j``, int64 ``(batch,)``.
        values: ``sqrt(n1 n2) M_ij``, ``(batch,)``.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def measure(self, left: Tensor, right: Tensor) -> Tensor:
        """``sqrt(n1 n2) (left right^T)_ij`` without the product matrix; shapes as :meth:`SensingBatch.measure`."""
        pairs = left.index_select(-2, self.rows) * right.index_select(-2, self.columns)
        return (left.shape[-2] * right.shape[-2]) ** 0.5 * pairs.sum(-1)


class MatrixBatch(NamedTuple):
    """The matrix that a sensing problem asks for; what recovery is judged by.

    Attributes:
        matrix: ``(1, rows, columns)``, floating point.
    """

    matrix: Tensor


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
