"""All parameters of an optimizer as one vector: where each lives in it, which part of it belongs to this rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor (without importing ``torch.distributed.tensor``, which takes a second)."""
    return hasattr(tensor, "placements")


def local_tensor(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_grad(param: Any) -> Tensor:
    """This rank's shard of the gradient, placed like the parameter."""
    grad = param.grad
    if is_dtensor(grad) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local_tensor(grad)


@dataclass
class FlatLayout:
    """Scratch memory for one vector of all local coordinates, and the views into it; never saved, rebuilt at need.

    Attributes:
        flat: (d,) in the compute dtype (float64 if anything is, else float32).
        views: per group, a view of ``flat`` shaped like each local parameter.
        bounds: per group, its slice of ``flat``.
        kept: indices of the coordinates that take part, or None for all.
        packed: those coordinates, zero-padded to a multiple of ``world_size``; ``flat`` itself if ``kept`` is None.
        columns: how many of them are real.
        mine: this rank's part of ``packed``.
        share: 1 / (number of ranks that hold each coordinate), shape (1,) or like ``packed``; None when that is 1.
        params_dtype: the parameters' widest dtype.
    """

    flat: Tensor
    views: list[list[Tensor]]
    bounds: list[tuple[int, int]]
    kept: Tensor | None
    packed: Tensor
    columns: int
    mine: Tensor
    share: Tensor | None
    params_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        groups: list[dict[str, Any]],
        *,
        double: bool = False,
        kept: Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
        share_group: dist.ProcessGroup | None = None,
    ) -> "FlatLayout":
        """Lay out the local shards of ``groups``.

        Args:
            groups: the optimizer's ``param_groups``.
            double: compute in float64 whatever the parameters' dtype.
            kept: (d,) bool, the coordinates that take part; None for all.
            rank: which part of ``packed`` is this rank's.
            world_size: into how many parts ``packed`` is split.
            share_group: with DTensors, the ranks over which inner products will be summed; None for all.
        """
        params = [p for group in groups for p in group["params"]]
        sizes = [local_tensor(p).numel() for p in params]
        device = local_tensor(params[0]).device
        params_dtype = params[0].dtype
        for p in params:
            params_dtype = torch.promote_types(params_dtype, p.dtype)
        dtype = torch.float64 if double or params_dtype == torch.float64 else torch.float32

        index = None if kept is None else kept.to(device).nonzero()[:, 0]
        columns = sum(sizes) if index is None else len(index)
        width = math.ceil(columns / world_size)
        packed = torch.zeros(width * world_size, dtype=dtype, device=device)
        flat = packed if index is None else torch.zeros(sum(sizes), dtype=dtype, device=device)

        pieces = iter(flat[: sum(sizes)].split(sizes))
        views = [[next(pieces).view(local_tensor(p).shape) for p in group["params"]] for group in groups]
        ends = [0]
        for group in views:
            ends.append(ends[-1] + sum(view.numel() for view in group))

        share = None
        if any(is_dtensor(p) for p in params):
            shares = [shards(p) / dist.get_world_size(share_group) for p in params]
            share = torch.tensor(shares, dtype=dtype).repeat_interleave(torch.tensor(sizes)).to(device)
            if len(set(shares)) == 1:
                share = None if shares[0] == 1 else torch.full((1,), shares[0], dtype=dtype, device=device)
        return cls(
            flat=flat,
            views=views,
            bounds=list(pairwise(ends)),
            kept=index,
            packed=packed,
            columns=columns,
            mine=packed[rank * width : (rank + 1) * width],
            share=share,
            params_dtype=params_dtype,
        )


def by_parameter(window: dict[str, Any], params: Sequence[Any], columnwise: Sequence[str]) -> list[dict[str, Any]]:
    """Split a flat state by parameter, the form that ``torch.distributed.checkpoint`` can reshard.

    Args:
        window: tensors (..., d) over all local coordinates under the keys ``columnwise``; anything under others.
        params: the parameters in order.
        columnwise: which keys run over coordinates; absent ones are left out.

    Returns:
        One dict per parameter. Columnwise entries have shape (..., *param.shape) and are DTensors placed like their
        parameter; the other entries are with the first parameter that requires a gradient.
    """
    result: list[dict[str, Any]] = []
    start = 0
    for p in params:
        shape = local_tensor(p).shape
        part = slice(start, start + shape.numel())
        start = part.stop
        pieces = {key: window[key][..., part] for key in columnwise if key in window}
        result.append({key: _placed_like(p, x.reshape(*x.shape[:-1], *shape)) for key, x in pieces.items()})
    _owner(params, result).update({key: value for key, value in window.items() if key not in columnwise})
    return result


def by_column(states: Sequence[dict[str, Any]], params: Sequence[Any], columnwise: Sequence[str]) -> dict[str, Any]:
    """Undo :func:`by_parameter`, also for full tensors or DTensors of another mesh; new memory.

    Parameters without an entry (frozen ones are not always saved) get zeros.
    """
    shared = _owner(params, states)
    others = {key: value for key, value in shared.items() if key not in columnwise}
    window = {key: value.clone() if isinstance(value, Tensor) else value for key, value in others.items()}
    for key in columnwise:
        if key not in shared:
            continue
        leading = shared[key].shape[: shared[key].dim() - _owner(params, params).dim()]
        pieces = []
        for p, state in zip(params, states, strict=True):
            local = local_tensor(p)
            if key in state:
                pieces.append(_shard_like(p, state[key]).reshape(*leading, local.numel()))
            else:
                pieces.append(torch.zeros(*leading, local.numel(), dtype=shared[key].dtype, device=local.device))
        window[key] = torch.cat(pieces, dim=-1)
    return window


def _owner(params: Sequence[Any], items: Sequence[Any]) -> Any:
    return next((item for p, item in zip(params, items, strict=True) if p.requires_grad), items[0])


def shards(param: Any) -> int:
    """Over how many ranks the parameter is split."""
    if not is_dtensor(param):
        return 1
    sizes = zip(param.device_mesh.shape, param.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def sum_over_shards(values: Sequence[Tensor], params: Sequence[Any]) -> Tensor:
    """Sum of one number per local tensor, over all tensors and all shards of DTensors."""
    if not any(is_dtensor(p) for p in params):
        home = values[0].device
        return torch.stack([value.to(home) for value in values]).sum()
    from torch.distributed.tensor import DTensor, Partial, Replicate

    by_layout: dict[Any, list[Tensor]] = {}
    for value, p in zip(values, params, strict=True):
        layout = (p.device_mesh, tuple(placement.is_shard() for placement in p.placements)) if is_dtensor(p) else None
        by_layout.setdefault(layout, []).append(value)
    totals = []
    for layout, group in by_layout.items():
        total = torch.stack(group).sum()
        if layout is not None:
            mesh, sharded = layout
            placements = [Partial() if shard else Replicate() for shard in sharded]
            total = DTensor.from_local(total, mesh, placements).full_tensor()
        totals.append(total)
    return torch.stack(totals).sum()


def _shifted_placements(param: Any, leading: int) -> list[Any]:
    """The parameter's placements for a tensor with ``leading`` more dimensions in front."""
    from torch.distributed.tensor import Replicate, Shard

    result: list[Any] = []
    for placement in param.placements:
        if placement.is_replicate():
            result.append(Replicate())
        elif type(placement) is Shard:
            result.append(Shard(placement.dim + leading))
        else:  # fully_shard over tensor parallelism
            result.append(type(placement)(placement.dim + leading, split_factor=placement.split_factor))
    return result


def _placed_like(param: Any, local: Tensor) -> Tensor:
    """``local`` (..., *local shape of param) as a DTensor (..., *param.shape)."""
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor

    leading = local.shape[: local.dim() - param.dim()]
    shape = torch.Size([*leading, *param.shape])
    return DTensor.from_local(
        local,
        param.device_mesh,
        _shifted_placements(param, len(leading)),
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def _shard_like(param: Any, value: Any) -> Tensor:
    """This rank's shard of ``value`` (..., *param.shape)."""
    if not is_dtensor(param):
        return value.full_tensor() if is_dtensor(value) else value
    from torch.distributed.tensor import distribute_tensor

    placements = _shifted_placements(param, value.dim() - param.dim())
    if not is_dtensor(value):
        return distribute_tensor(value.to(local_tensor(param).device), param.device_mesh, placements).to_local()
    return value.redistribute(param.device_mesh, placements).to_local()
