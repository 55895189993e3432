"""Recall@k and NDCG@k of top-k recommendations, as the literature on autoencoders for recommendation defines them."""

from typing import Any

import torch
from torch import Tensor

from lit_methods.batches import InteractionBatch, sparse_rows
from lit_methods.metrics.regret import _Float64Metric

__all__ = ["NDCGAtK", "RecallAtK", "top_unseen_items"]


def top_unseen_items(scores: Tensor, history: InteractionBatch, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best items of each user that are not in the history, best first.

    Args:
        scores: ``(users, num_items)``; overwritten with ``-inf`` at the items of the history.
        history: the users' rows.
        k: in [1, num_items].

    Returns:
        items: int64 ``(users, k)``; -1 where a user has fewer than ``k`` unseen items.
        scores: ``(users, k)``; ``-inf`` at these places.
    """
    scores[history.rows(), history.items] = float("-inf")
    best, items = scores.topk(k, dim=1)
    return items.masked_fill(best == float("-inf"), -1), best


class _UserMean(_Float64Metric):
    """The mean over users of :meth:`per_user`, with float64 sums; users without held-out items are left out."""

    higher_is_better = True
    total: Tensor
    squares: Tensor
    count: Tensor
    skipped: Tensor

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be an integer >= 1, got {k!r}")
        self.k = k
        for name in ("total", "squares", "count", "skipped"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, ranked_items: Tensor, target_items: Tensor, target_offsets: Tensor) -> None:
        """Add users.

        Args:
            ranked_items: each user's recommendations, best first and each at most once, int64 ``(users, >= k)`` (or
                all items, if there are fewer than k); -1 for none.
            target_items: held-out items of user ``u`` at ``target_offsets[u]:target_offsets[u + 1]``, int64, each once.
            target_offsets: int64 ``(users + 1,)``.
        """
        counts = target_offsets.diff()
        values = self.per_user(self._hits(ranked_items[:, : self.k], target_items, target_offsets), counts)
        has_targets = counts > 0
        values = torch.where(has_targets, values, 0.0)
        self.total += values.sum()
        self.squares += values.square().sum()
        self.count += has_targets.sum()
        self.skipped += (~has_targets).sum()

    def per_user(self, hits: Tensor, counts: Tensor) -> Tensor:
        """The metric of each user, float64 ``(users,)``.

        Args:
            hits: whether the item at each rank is a target, float64 ``(users, <= k)``.
            counts: number of targets, int64 ``(users,)``; the value at 0 does not matter.
        """
        raise NotImplementedError

    def compute(self) -> Tensor:
        """The mean over users with targets, a float64 scalar; NaN when there are none."""
        return self.total / self.count

    def standard_error(self) -> Tensor:
        """Standard deviation over users divided by the square root of their number, over all ranks."""
        with self.sync_context():
            mean = self.total / self.count
            return ((self.squares / self.count - mean.square()).clamp(min=0) / self.count).sqrt()

    @staticmethod
    def _hits(ranked: Tensor, target_items: Tensor, target_offsets: Tensor) -> Tensor:
        """Membership by binary search among the sorted keys ``user * stride + item``."""
        users = torch.arange(len(ranked), device=ranked.device)
        if target_items.numel() == 0:
            return torch.zeros(ranked.shape, dtype=torch.float64, device=ranked.device)
        stride = 1 + torch.maximum(target_items.max(), ranked.max())
        keys = (sparse_rows(target_items, target_offsets) * stride + target_items).sort().values
        wanted = users[:, None] * stride + ranked
        found = keys[torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)] == wanted
        return (found & (ranked >= 0)).double()


class RecallAtK(_UserMean):
    """Hits among the ``k`` best items, divided by ``min(k, number of targets)``: 1 for a perfect ranking.

    ``torchmetrics.retrieval.RetrievalRecall`` divides by the number of targets instead.

    Args:
        k: length of the ranking, >= 1.
        **kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``k`` out of range.

    Example:
        >>> import torch
        >>> recall = RecallAtK(2)
        >>> recall.update(torch.tensor([[4, 0, 1]]), torch.tensor([1, 3, 4]), torch.tensor([0, 3]))
        >>> recall.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def per_user(self, hits: Tensor, counts: Tensor) -> Tensor:
        """Hits over ``min(k, targets)``."""
        return hits.sum(1) / counts.clamp(1, self.k)


class NDCGAtK(_UserMean):
    """Sum of ``1 / log2(rank + 1)`` over the hits among the ``k`` best, divided by that of a perfect ranking.

    Args:
        k: length of the ranking, >= 1.
        **kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``k`` out of range.

    Example:
        >>> import torch
        >>> ndcg = NDCGAtK(2)
        >>> ndcg.update(torch.tensor([[4, 0, 1]]), torch.tensor([1, 3, 4]), torch.tensor([0, 3]))
        >>> ndcg.compute()  # 1 / (1 + 1 / log2(3))
        tensor(0.6131, dtype=torch.float64)
    """

    def per_user(self, hits: Tensor, counts: Tensor) -> Tensor:
        """Discounted hits over the discounts of the first ``min(k, targets)`` ranks."""
        discounts = 1 / torch.arange(2, self.k + 2, dtype=torch.float64, device=hits.device).log2()
        return hits @ discounts[: hits.shape[1]] / discounts.cumsum(0)[counts.clamp(1, self.k) - 1]
