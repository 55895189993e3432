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
