"""EASE, the closed-form linear autoencoder that every recommender should be compared with (Steck, WWW 2019)."""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional

from lit_methods.batches import InteractionBatch

__all__ = ["EASE"]


class EASE(nn.Module):
    """Scores ``X B`` with ``B = I - P / diag(P)``, ``P = (X^T X + l2 I)^-1`` (arXiv 1905.03375, eq. 8).

    ``B`` is the ridge regression of every item on all others. It is dense: ``num_items^2`` numbers, and its computation
    in float64 takes 4 times that and ``O(num_items^3)``: minutes at 20,000 items.

    Args:
        histories: the training users, all of them.
        num_items: number of items, >= 1.
        l2: ridge penalty, > 0; of the order of 500 for MovieLens-20M, 100 for MovieLens-100K.

    Raises:
        ValueError: an argument out of range.
    """

    weight: Tensor

    def __init__(self, histories: InteractionBatch, num_items: int, l2: float = 500.0) -> None:
        super().__init__()
        if not 0 < l2 < float("inf"):
            raise ValueError(f"l2 must be > 0 and finite, got {l2}")
        if num_items < 1 or (len(histories.items) and int(histories.items.max()) >= num_items):
            raise ValueError(f"num_items must exceed every item id, got {num_items}")
        items, offsets = histories.items.cpu().numpy(), histories.offsets.cpu().numpy()
        values = np.ones(len(items)) if histories.values is None else histories.values.cpu().double().numpy()
        x = sparse.csr_array((values, items, offsets), (histories.num_users, num_items))
        gram = torch.from_numpy((x.T @ x).toarray())
        gram.diagonal().add_(l2)
        p = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        weight = (-p / p.diagonal()).fill_diagonal_(0)
        self.register_buffer("weight", weight.float().to(histories.items.device))

    def forward(self, history: InteractionBatch) -> Tensor:
        """Scores of all items, ``(users, num_items)``."""
        return functional.embedding_bag(
            history.items,
            self.weight,
            history.offsets,
            mode="sum",
            per_sample_weights=history.values,
            include_last_offset=True,
        )
