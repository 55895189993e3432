"""Losses, distances and layers made of :class:`~lit_methods.transport.SinkhornNewton`."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from lit_methods.optim.foundation.ranks import rank, world_size
from lit_methods.transport.point_clouds import point_cost, tiled_value
from lit_methods.transport.sinkhorn_newton_sparse import SinkhornNewton, sinkhorn_newton

__all__ = ["OTLoss", "SinkhornAssignment", "WassersteinDistance", "wasserstein_distance"]


def wasserstein_distance(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: int = 2,
    eta: float = 1000.0,
) -> Tensor:
    """Wasserstein-``p`` distance between weighted point sets or histograms, differentiable.

    ``<C, P>^(1/p)`` at the entropic plan, computed in float64. ``<C, P>`` exceeds the exact optimum by at most
    ``log(n m) / eta`` of the largest cost, usually by far less.

    Args:
        x: ``(..., n, d)``; for histograms the :func:`~lit_methods.transport.grid_points`.
        y: ``(..., m, d)``.
        a: weights of ``x``, ``(..., n)`` >= 0, of sum 1; ``None``: uniform.
        b: weights of ``y``, ``(..., m)`` >= 0, of sum 1; ``None``: uniform.
        p: 1 or 2.
        eta: inverse regularization > 0, relative to the largest cost of each problem.

    Returns:
        ``(...)``, in units of the coordinates and of the dtype of ``x``. The gradient at distance 0 is 0.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> wasserstein_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]]), p=1)
        tensor(2.)
    """
    cost = point_cost(x.double(), y.double(), p)
    scale = cost.detach().amax((-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    transported = sinkhorn_newton(cost / scale, a, b, eta=eta).cost * scale[..., 0, 0]
    if p == 2:  # the root has no derivative at 0, where the distance is least: 0 is a subgradient
        apart = transported > 0
        transported = torch.where(apart, torch.where(apart, transported, 1.0).sqrt(), 0.0)
    return transported.to(x.dtype)


class OTLoss(nn.Module):
    """Optimal transport between two batches of point sets, for use in any model.

    Gradients are exact at the solution (see :func:`~lit_methods.transport.sinkhorn_newton`). Each pair is a problem of
    its own; under data parallelism the loss of a rank is that of its pairs, and gradients average as ever.

    Args:
        eta: inverse regularization > 0, in units of 1 / cost. Above about 10 over the typical squared distance of
            neighbours the loss is nearly that of the linear program, and its gradient nearly piecewise constant.
        p: cost of a pair: 1 Euclidean distance, 2 its square.
        value: ``"regularized"`` includes the entropy term, may be negative and costs no linear solve in backward;
            ``"transport"`` is ``<C, P>``.
        debias: subtract half of each set's transport to itself, with the entropy term: the Sinkhorn divergence, which
            is 0 between equal sets and not below. Not with ``value="transport"``.
        reduction: of the batch: ``"mean"``, ``"sum"`` or ``"none"``.
        max_newton: Newton steps at most, >= 0.
        dtype: ``"float32"`` or ``"float64"`` to solve in; ``None``: that of the points (at least float32).
        gather: join the points of all ranks to one problem, of which each rank keeps the rows of its own ``x``. All
            ranks must hold equally many points.
        tiled: make the costs anew in tiles whenever they are needed, so that memory grows with the number of points and
            not with its square; not with ``value="transport"``. For sets of many thousand points; takes longer.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        eta: float = 100.0,
        p: int = 2,
        value: Literal["regularized", "transport"] = "regularized",
        debias: bool = False,
        reduction: Literal["mean", "sum", "none"] = "mean",
        max_newton: int = 100,
        dtype: Literal["float32", "float64"] | None = None,
        gather: bool = False,
        tiled: bool = False,
    ) -> None:
        super().__init__()
        if p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {p}")
        if value not in ("regularized", "transport"):
            raise ValueError(f"value must be 'regularized' or 'transport', got {value!r}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if dtype not in (None, "float32", "float64"):
            raise ValueError(f"dtype must be 'float32', 'float64' or None, got {dtype!r}")
        if debias and value == "transport":
            raise ValueError("debias=True needs value='regularized', got value='transport'")
        if tiled and value == "transport":
            raise ValueError("tiled=True needs value='regularized', got value='transport'")
        solver_dtype = None if dtype is None else getattr(torch, dtype)
        self.solver = SinkhornNewton(eta, max_newton=max_newton, dtype=solver_dtype, row_sharded=gather)
        self.p = p
        self.value = value
        self.debias = debias
        self.reduction = reduction
        self.tiled = tiled

    def forward(self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """The loss, a scalar, or one number per pair with ``reduction="none"``.

        Args:
            x: ``(..., n, d)``.
            y: ``(..., m, d)``.
            a: weights of ``x``, ``(..., n)`` >= 0; ``None``: uniform.
            b: weights of ``y``, ``(..., m)`` >= 0, with the sums of ``a``; ``None``: uniform.
        """
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.solver.dtype or torch.promote_types(x.dtype, torch.float32)
            x, y = x.to(dtype), y.to(dtype)
            all_x, all_y, all_a, all_b = x, y, a, b
            if self.solver.sharded:
                a, b = (w if w is None else w / world_size() for w in (a, b))
                all_x, all_y = _Gather.apply(x, -2), _Gather.apply(y, -2)
                all_a, all_b = (w if w is None else _Gather.apply(w, -1) for w in (a, b))
            losses = self._transport(x, all_y, a, all_b)
            if self.debias:
                losses = losses - (self._transport(x, all_x, a, all_a) + self._transport(y, all_y, b, all_b)) / 2
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def _transport(self, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        if self.tiled:
            return tiled_value(self.solver, x, y, a, b, self.p)
        cost = point_cost(x, y, self.p)
        return self.solver(cost, a, b).cost if self.value == "transport" else self.solver.value(cost, a, b)


class _Gather(torch.autograd.Function):
    """The tensors of all ranks joined along ``dim``; gradients of the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size(), ctx.dim)[rank()], None


class SinkhornAssignment(nn.Module):
    """A layer that turns scores into a doubly stochastic matrix, which tends to a permutation as ``eta`` grows.

    Args:
        eta: how sharply the best assignment is preferred, > 0, in units of 1 / score.
        max_newton: Newton steps at most, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, eta: float = 1.0, max_newton: int = 100) -> None:
        super().__init__()
        self.solver = SinkhornNewton(eta, max_newton=max_newton)

    def forward(self, scores: Tensor) -> Tensor:
        """Matrices ``(..., n, n)`` whose rows and columns sum to 1, of scores ``(..., n, n)``; larger is better."""
        if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2]:
            raise ValueError(f"scores must have shape (..., n, n), got {tuple(scores.shape)}")
        return scores.shape[-1] * self.solver(-scores).plan


class WassersteinDistance(Metric):
    """Mean :func:`wasserstein_distance` of pairs of point sets or histograms, over batches and ranks.

    Args:
        p: 1 or 2.
        eta: inverse regularization > 0, relative to the largest cost of each pair.
        **kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> metric = WassersteinDistance(p=1)
        >>> metric.update(torch.zeros(1, 3, 2), torch.ones(1, 3, 2))
        >>> metric.compute()
        tensor(1.4142)
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update: bool = False

    total: Tensor
    pairs: Tensor

    def __init__(self, p: int = 2, eta: float = 1000.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {p}")
        if not 0 < eta < float("inf"):
            raise ValueError(f"eta must be > 0 and finite, got {eta}")
        self.p = p
        self.eta = eta
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
        """Add pairs: points ``(..., n, d)`` and ``(..., m, d)``, weights ``(..., n)`` and ``(..., m)`` of sum 1."""
        distances = wasserstein_distance(x, y, a, b, p=self.p, eta=self.eta)
        self.total = self.total + distances.sum()
        self.pairs = self.pairs + distances.numel()

    def compute(self) -> Tensor:
        """The mean distance so far."""
        return self.total / self.pairs
