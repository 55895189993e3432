"""Batch contracts: the NamedTuples that methods and datamodules share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class SupervisedBatch(NamedTuple):
    """One mini-batch of labelled examples; unpacks as ``x, y = batch``.

    Attributes:
        x: inputs, ``(batch, ...)``, floating point. Image datamodules give ``(batch, channels, height, width)``.
        y: targets: ``(batch,)`` int64 class indices, or ``(batch, ...)`` floating point values for regression.
    """

    x: Tensor
    y: Tensor


class ObservationBatch(NamedTuple):
    """Data sets, or observations of one problem each.

    Attributes:
        values: ``(batch, ...)`` floating point.
    """

    values: Tensor


Prompt = str | list[dict[str, Any]]
"""A plain text, or chat messages ``[{"role": ..., "content": ...}, ...]`` that end before the assistant's answer.

Contents are texts; further fields of a message, such as ``tool_calls``, are for the chat template.
"""


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
        if self.matrices.shape[1:] != (left.shape[-2], right.shape[-2]):
            raise ValueError(
                f"matrices must be (batch, {left.shape[-2]}, {right.shape[-2]}) to measure left right^T, got "
                f"{tuple(self.matrices.shape)}"
            )
        return (left @ right.mT).flatten(-2) @ self.matrices.flatten(1).mT


class RankOneBatch(NamedTuple):
    """Measurements by ``A_i = a_i b_i^T``; a :class:`SensingBatch` that never stores the ``A_i``.

    Isotropic, as there, with independent standard normal ``a_i`` and ``b_i``.

    Attributes:
        row_vectors: the ``a_i``, ``(batch, rows)``, floating point.
        column_vectors: the ``b_i``, ``(batch, columns)``.
        values: ``a_i^T M b_i``, ``(batch,)``.
    """

    row_vectors: Tensor
    column_vectors: Tensor
    values: Tensor

    def measure(self, left: Tensor, right: Tensor) -> Tensor:
        """``a_i^T left right^T b_i`` without the product matrix; shapes as :meth:`SensingBatch.measure`."""
        return ((self.row_vectors @ left) * (self.column_vectors @ right)).sum(-1)


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


class Spaces(NamedTuple):
    """What an environment or a data set takes and gives; networks get sizes and bounds that were left out from it.

    Attributes:
        observation_shape: shape of one observation.
        num_actions: number of discrete actions; 0 if actions are continuous.
        low: smallest value of each number of a continuous action, -inf where it has none; empty for discrete ones.
        high: largest value of each.
        observed: ``low`` and ``high`` are no bounds but the extremes of recorded actions.
    """

    observation_shape: tuple[int, ...]
    num_actions: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    observed: bool = False


class RolloutBatch(NamedTuple):
    """What ``N`` environments did in ``T`` steps under the policy that is about to be updated.

    Attributes:
        observations: what the policy saw, float32 ``(T, N, *observation)``.
        actions: what it chose, before any clipping, float32 ``(T, N, action)`` or int64 ``(T, N)``.
        log_probs: log-density of these actions under the policy at that time, ``(T, N)``.
        rewards: raw rewards, ``(T, N)``.
        next_observations: what followed, ``(T, N, *observation)``; the final observation where an episode ended, not
            the first one of the next.
        terminations: 1 where the episode came to its end: no value follows, ``(T, N)`` in {0, 1}.
        truncations: 1 where it was cut, as by a time limit: the value of ``next_observations`` follows, ``(T, N)``.
        episode_returns: undiscounted returns of the episodes that ended, ``(episodes,)``.
        env_steps: environment steps since training began, on this rank, int64 scalar.
    """

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminations: Tensor
    truncations: Tensor
    episode_returns: Tensor
    env_steps: Tensor


class TransitionBatch(NamedTuple):
    """One mini-batch of independent environment steps, from a replay buffer or a data set.

    Attributes:
        observations: float32 ``(batch, *observation)``.
        actions: in the environment's units, float32 ``(batch, action)`` or int64 ``(batch,)``.
        rewards: ``(batch,)``.
        next_observations: ``(batch, *observation)``.
        terminations: 1 where no value follows, ``(batch,)`` in {0, 1}. A cut by a time limit is not one.
        episode_returns: undiscounted returns of the training episodes that ended since the last batch,
            ``(episodes,)``; empty for a data set.
        env_steps: environment steps since training began, on this rank, int64 scalar; 0 for a data set.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminations: Tensor
    episode_returns: Tensor
    env_steps: Tensor


class SequenceBatch(NamedTuple):
    """Whole recorded episodes, padded with zeros to the longest of the batch, ``T`` steps.

    Attributes:
        observations: float32 ``(batch, T, *observation)``.
        actions: ``(batch, T, ...)``.
        rewards: ``(batch, T)``.
        returns_to_go: sum of the rewards from here to the episode's end, ``(batch, T)``.
        terminations: 1 where no value follows, ``(batch, T)`` in {0, 1}.
        mask: which steps there are, bool ``(batch, T)``.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    returns_to_go: Tensor
    terminations: Tensor
    mask: Tensor


class EpisodeBatch(NamedTuple):
    """Episodes that a policy played for its evaluation.

    Attributes:
        returns: undiscounted returns, ``(episodes,)``.
        lengths: steps, int64 ``(episodes,)``.
    """

    returns: Tensor
    lengths: Tensor


class ImitationBatch(NamedTuple):
    """States that a behaviour policy visited, with the expert's actions there.

    Attributes:
        observations: ``(batch, observation_size)`` float32.
        actions: the expert's actions, ``(batch, action_size)`` float32, before they are made valid for the environment.
        rewards: what the behaviour policy got for its own action, ``(batch,)`` float32.
        ends: whether an episode ended with that action, ``(batch,)`` bool.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    ends: Tensor


class OnlineRound(NamedTuple):
    """One round of online convex optimisation: the loss is the mean over its samples.

    What features and targets mean depends on the loss: ``linear`` ``<features, x>`` and ``quadratic``
    ``|x - features|^2 / 2`` use features only; all others compare ``<features, x>`` with the target (``least_squares``
    and ``abs`` any number, ``logistic`` and ``hinge`` -1 or 1).

    Attributes:
        features: ``(samples, dim)``, floating point.
        targets: ``(samples,)``.
        comparator: the point of the decision set that minimises this round's expected loss, ``(dim,)``; the dynamic
            regret is measured against it.
    """

    features: Tensor
    targets: Tensor
    comparator: Tensor


class InteractionBatch(NamedTuple):
    """Histories of users as sparse rows (CSR), and what of each user's interactions was held out.

    Attributes:
        items: the items that user ``u`` interacted with are ``items[offsets[u]:offsets[u + 1]]``, each once, int64
            ``(nnz,)``.
        offsets: int64 ``(users + 1,)``, from 0 to ``nnz``, never falling.
        values: how often or how much, >= 0, floating point ``(nnz,)``; ``None``: 1 each.
        target_items: held-out items, which are not in the history, int64; for training empty.
        target_offsets: int64 ``(users + 1,)``, as ``offsets``.
    """

    items: Tensor
    offsets: Tensor
    values: Tensor | None
    target_items: Tensor
    target_offsets: Tensor

    @property
    def num_users(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def rows(self) -> Tensor:
        """The row of each entry of ``items``, int64 ``(nnz,)``."""
        return sparse_rows(self.items, self.offsets)


def sparse_rows(items: Tensor, offsets: Tensor) -> Tensor:
    """The row of each entry of sparse rows ``(items, offsets)``, int64 ``(nnz,)``."""
    users = torch.arange(len(offsets) - 1, device=items.device)
    return users.repeat_interleave(offsets.diff(), output_size=len(items))


class TimeSeriesBatch(NamedTuple):
    """One mini-batch of time series, padded to one length.

    Attributes:
        rows: row of each series in its whole data set, int64 ``(batch,)``.
        values: ``(batch, steps, numbers)``, floating point; anything, also NaN, where ``mask`` is false.
        mask: which steps were observed, bool ``(batch, steps)``.
    """

    rows: Tensor
    values: Tensor
    mask: Tensor


class PointSetBatch(NamedTuple):
    """Pairs of point sets of uniform weight; nothing says which point of one belongs to which of the other.

    Attributes:
        source: ``(batch, n, dimensions)``, floating point.
        target: ``(batch, m, dimensions)``.
    """

    source: Tensor
    target: Tensor


class PathBatch(NamedTuple):
    """Time series that share one grid of times; a series of its own time stamps is one with holes in it.

    Attributes:
        times: increasing times ``(T,)``, floating point: the union of the time stamps of all series. The first is where
            a model's state starts, whether anything was observed there or not.
        values: observations ``(batch, T, ...)``, floating point; NaN is allowed where ``mask`` is False.
        mask: what was observed, bool ``(batch, T)``.
    """

    times: Tensor
    values: Tensor
    mask: Tensor
