"""SSO's targets of one step: the outputs, the loss's gradient there, and what is summed over ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_methods.optim.foundation.ranks import mean_over_ranks


@dataclass
class Targets:
    """Outputs of a network and the loss's gradient there, for one step.

    Attributes:
        z: the outputs, float32 or float64, one tensor for each call.
        slopes: gradient of the mean loss over this rank's examples with respect to ``z``.
        count: n, examples on this rank.
        summed: whether the loss is a sum over examples.
        sign: -1 when the loss is maximised.
        num_batch_dims: leading dimensions of ``z`` that count examples.
        mask: 1 for entries of examples that count, 0 for padding; None for no padding.
        index: the examples' indices in the data set, or None.
        rank_weight: this rank's share of all examples times the number of ranks.
        squared_norm: Σ |g_i|² over all examples of all ranks.
        total: examples of all ranks.
        group: the ranks, or None for one process.
    """

    z: list[Tensor]
    slopes: list[Tensor]
    count: float
    summed: bool
    sign: float
    num_batch_dims: int
    mask: list[Tensor] | None
    index: Tensor | None
    group: dist.ProcessGroup | None
    rank_weight: float = 1.0
    squared_norm: float = 0.0
    total: float = 0.0

    @classmethod
    def of(
        cls,
        z: list[Tensor],
        slopes: list[Tensor],
        *,
        sign: float,
        summed: bool,
        num_batch_dims: int,
        num_items: Callable[[Tensor], Any] | None,
        max_norm: float | None,
        index: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> "Targets":
        """Count the examples, scale to the mean loss, and shorten long gradients."""
        counts, masks = zip(*(_count(s, num_batch_dims, num_items) for s in slopes), strict=True)
        count = float(sum(counts))
        divisor = count or 1.0  # padding alone
        wide = [torch.promote_types(x.dtype, torch.float32) for x in z]
        z = [x.to(dtype) for x, dtype in zip(z, wide, strict=True)]
        slopes = [s.to(dtype) / divisor if summed else s.to(dtype) for s, dtype in zip(slopes, wide, strict=True)]
        mask = (
            [m.expand_as(x).to(x.dtype) for m, x in zip(masks, z, strict=True)]
            if num_items and masks[0] is not None
            else None
        )
        if max_norm is not None:
            slopes = [_shortened(s, max_norm / divisor, num_batch_dims) for s in slopes]
        return cls(z, slopes, count, summed, sign, num_batch_dims, mask, index, group)

    def summary(self, loss: Tensor | None) -> list[float]:
        """The loss and |g|², reduced over the ranks; fills the sums over ranks. One synchronisation."""
        squared = torch.stack([s.square().sum().to(self.z[0].device) for s in self.slopes]).sum()
        local = torch.stack([squared.new_tensor(self.count), self.count**2 * squared])
        ranks = 1
        if self.group is not None:
            ranks = dist.get_world_size(self.group)
            local = mean_over_ranks([local], self.group)[0]
        mean_count, mean_squared = local.tolist()
        if mean_count == 0:
            return [math.nan, math.nan]
        self.rank_weight = self.count / mean_count
        self.total, self.squared_norm = ranks * mean_count, ranks * mean_squared
        return [0.0 if loss is None else self.sign * self.mean_loss(loss), self.squared_norm]

    def mean_loss(self, loss: Tensor) -> float:
        """The mean over all ranks' examples of what is minimised, from this rank's loss."""
        value = self.sign * self.rank_weight * loss.detach().double().reshape(1)
        if self.summed:
            value = value / (self.count or 1.0)
        return float(value if self.group is None else mean_over_ranks([value], self.group)[0])

    def masked(self, metric: list[Tensor]) -> list[Tensor]:
        """The metric, zero where the mask is."""
        return metric if self.mask is None else [a * m for a, m in zip(metric, self.mask, strict=True)]

    @property
    def rms_grad_norm(self) -> float:
        """Root mean square over examples of |g_i|."""
        return math.sqrt(self.squared_norm / self.total)


def add_squared_slopes(table: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
    """Add g² to the rows of the batch's examples; the table (examples, outputs), and the batch's rows shaped as z.

    The table grows with the greatest index. With several ranks each holds the whole table.
    """
    (z,), (s,) = targets.z, targets.slopes
    if targets.index is None:
        raise RuntimeError(
            "AdaGradPerExample needs the examples' indices: call step with a closure that returns (targets, loss_fn, "
            "indices)"
        )
    index = targets.index.reshape(-1).to(z.device)
    squares = (targets.count * s).square().flatten(0, targets.num_batch_dims - 1).flatten(1)
    if len(index) != len(squares):
        raise RuntimeError(f"the closure gave {len(index)} indices for {len(squares)} examples")
    size = index.max() + 1
    if targets.group is not None:
        dist.all_reduce(size, op=dist.ReduceOp.MAX, group=targets.group)
    added = squares.new_zeros(int(size), squares.shape[1]).index_add_(0, index, squares)
    if targets.group is not None:
        dist.all_reduce(added, group=targets.group)
    old = added.new_zeros(0, added.shape[1]) if table is None else table.to(added)
    rows = max(len(old), len(added))
    table = added.new_zeros(rows, added.shape[1])
    table[: len(old)] += old
    table[: len(added)] += added
    return table, table[index].view(z.shape)


def _count(slope: Tensor, dims: int, num_items: Callable[[Tensor], Any] | None) -> tuple[float, Tensor | None]:
    """The number of examples, and a mask that broadcasts to the targets if there is one."""
    if slope.dim() < dims:
        raise ValueError(f"num_batch_dims={dims} but the targets have shape {tuple(slope.shape)}")
    if num_items is None:
        return float(math.prod(slope.shape[:dims])), None
    given = num_items(slope)
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        return float(given.sum()), given.view(given.shape + (1,) * (slope.dim() - given.dim()))
    return float(given), None


def _shortened(slope: Tensor, max_norm: float, dims: int) -> Tensor:
    rows = slope.flatten(dims) if slope.dim() > dims else slope.unsqueeze(-1)
    norms = rows.norm(dim=-1)
    factors = (max_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return slope * factors.view(factors.shape + (1,) * (slope.dim() - dims))
