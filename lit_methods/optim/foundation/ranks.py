"""The processes of ``torch.distributed``: one place that asks whether there are several."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks of ``group`` (None: all); 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This rank of ``group`` (None: all); 0 without a process group."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def gather_objects(value: Any) -> list[Any]:
    """What every rank passes, in the order of the ranks; anything that pickles."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def mean_over_ranks(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Means over the ranks of ``group`` (None: all), by one all-reduce for each dtype and device."""
    size = world_size(group)
    if size == 1:
        return list(tensors)
    result: list[Tensor] = list(tensors)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    for indices in kinds.values():
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices])
        dist.all_reduce(flat, group=group)
        flat /= size
        for i, piece in zip(indices, flat.split([tensors[i].numel() for i in indices]), strict=True):
            result[i] = piece.view(tensors[i].shape)
    return result
