"""Histories of users: matrices as sparse rows, and what may be wrong with a batch."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lit_methods.batches import InteractionBatch

Likelihood = Literal["multinomial", "gaussian", "logistic"]
History = InteractionBatch | Tensor


def sparse_rows(history: Tensor, num_items: int) -> InteractionBatch:
    """The rows of a matrix, dense or ``sparse_csr``."""
    if history.ndim != 2 or history.shape[1] != num_items:
        raise ValueError(f"history must have shape (users, {num_items}), got {tuple(history.shape)}")
    if history.layout not in (torch.strided, torch.sparse_csr):
        raise ValueError(f"history must be dense or sparse_csr, got {history.layout}: convert it by to_sparse_csr()")
    if history.layout == torch.sparse_csr:
        offsets, items, values = history.crow_indices(), history.col_indices(), history.values()
        kept = values != 0  # a stored zero is no interaction, as in a dense matrix
        offsets = functional.pad(kept.cumsum(0), (1, 0))[offsets]
        items, values = items[kept], values[kept]
    else:
        rows, items = history.nonzero(as_tuple=True)
        values = history[rows, items]
        offsets = functional.pad((history != 0).sum(1).cumsum(0), (1, 0))
    return InteractionBatch(items, offsets, values, items[:0], torch.zeros_like(offsets))


def check_history(batch: InteractionBatch, num_items: int, likelihood: Likelihood) -> None:
    """Raise a ``ValueError`` that says what is out of range in a batch."""
    items, offsets, values = batch.items, batch.offsets, batch.values
    for name, ids, ends in (("items", items, offsets), ("target_items", batch.target_items, batch.target_offsets)):
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= num_items):
            raise ValueError(
                f"{name} must be in [0, {num_items - 1}] for num_items={num_items}, got {int(ids.min())} to "
                f"{int(ids.max())}"
            )
        if len(ends) == 0 or int(ends[0]) != 0 or int(ends[-1]) != len(ids) or bool((ends.diff() < 0).any()):
            prefix = name.removesuffix("items")
            raise ValueError(
                f"{prefix}offsets must rise from 0 to {len(ids)}, the number of {name}, got {ends.tolist()}"
            )
    if len(batch.target_offsets) != len(offsets):
        raise ValueError(f"target_offsets must be as many as offsets, {len(offsets)}, got {len(batch.target_offsets)}")
    if values is None:
        return
    if len(values) != len(items):
        raise ValueError(f"values must be as many as items, {len(items)}, got {len(values)}")
    high = 1.0 if likelihood == "logistic" else float("inf")
    if len(values) and not (values.isfinite().all() and float(values.min()) >= 0 and float(values.max()) <= high):
        raise ValueError(
            f"values must be in [0, {high:g}] and finite for likelihood={likelihood!r}, got {float(values.min())} to "
            f"{float(values.max())}"
        )
