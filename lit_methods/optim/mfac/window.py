"""The algebra of a ring buffer of gradients: Gram matrix, m x m system, two passes over the rows.

``mfac.py`` holds the optimizer and the paper; this file is its inner function and runs on plain tensors. Nothing here
reads a value back to the host.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def full_precision_products() -> Iterator[None]:
    """No TF32 or bfloat16 inside float32 products, whatever precision the user chose for the network."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@full_precision_products()
def precondition(
    gradient: Tensor,
    window: dict[str, Any],
    *,
    damping: float,
    filled: bool = False,
    rank2: bool = False,
    share: Tensor | None = None,
    all_reduce: Callable[[Tensor, Any], Tensor] | None = None,
) -> Tensor:
    """Put a gradient into the window and overwrite it with the preconditioned direction.

    Args:
        gradient: (d,) float32 or float64; on return u = (λI + GᵀG/m)⁻¹ gradient, or zeros when not accepted.
        window: ``history`` (m, d), the rows divided by ``row_scale`` (m,); ``gram`` (m, m) of the rows; ``index`` (1,),
            the row to replace; ``count`` (1,), gradients seen; with ``rank2`` also ``inverse`` (m, m).
        damping: λ > 0.
        filled: divide by the number of gradients in the window instead of m.
        rank2: update ``inverse`` instead of factoring.
        share: weight of each column in the inner products, for columns that other ranks hold too.
        all_reduce: combines a small vector over the ranks that hold other columns, by a ``torch.distributed.ReduceOp``.

    Returns:
        One-element bool tensor: whether the gradient was finite. If not, the window is unchanged.
    """
    history, row_scale, gram, index = window["history"], window["row_scale"], window["gram"], window["index"]
    rows = len(gram)
    scale = _row_scale(gradient, all_reduce) if history.dtype == torch.float16 else gradient.new_ones(1)
    row = (gradient / scale).to(history.dtype)
    stored = row.to(gradient.dtype) * scale  # what the window will hold: the Gram matrix must be of exactly this
    weighted = stored if share is None else stored * share
    products = torch.cat([dot_rows(history, weighted) * row_scale, dot_rows(stored[None], weighted)])
    if all_reduce is not None:
        products = all_reduce(products, dist.ReduceOp.SUM)
    products, squared_norm = products[:-1], products[-1:]
    accepted = squared_norm.isfinite()
    newest = torch.arange(rows, device=index.device) == index
    products = torch.where(newest, squared_norm, products)
    products = torch.where(accepted, products, gram.index_select(0, index)[0])

    row_scale.index_copy_(0, index, torch.where(accepted, scale.double(), row_scale.index_select(0, index)))
    history.index_copy_(0, index, torch.where(accepted, row, history.index_select(0, index)))
    gram.index_copy_(0, index, products[None]).index_copy_(1, index, products[:, None])
    window["count"].add_(accepted)

    seen = window["count"].clamp(1, rows) if filled else rows
    noise = 16 * torch.finfo(gradient.dtype).eps * rows**0.5  # spectral norm of the rounding errors, with a margin
    ridge = torch.clamp(gram.diagonal() * noise, min=damping * seen)
    weights = _exchange_row(window, ridge, newest, accepted, damping) if rank2 else _solve(gram, ridge, newest)
    sum_rows(history, weights * row_scale * seen * accepted, out=gradient)
    index.add_(accepted).remainder_(rows)
    return accepted


def dot_rows(history: Tensor, x: Tensor) -> Tensor:
    """``history @ x`` in float64, shape (m,)."""
    total = torch.zeros(len(history), dtype=torch.float64, device=x.device)
    for rows, columns, tile in _tiles(history, x.dtype):
        total[rows] += tile.mv(x[columns])
    return total


def sum_rows(history: Tensor, weights: Tensor, out: Tensor) -> None:
    """``out = weights @ history`` in ``out``'s dtype, shape (d,)."""
    weights = weights.to(out.dtype)
    out.zero_()
    for rows, columns, tile in _tiles(history, out.dtype):
        out[columns].addmv_(tile.t(), weights[rows])


def _tiles(history: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Pieces of the window in ``dtype``.

    Dot products over a tile's columns are summed in ``dtype``, tiles in float64: at 2 million columns this cuts the
    CPU's error from 2e-4 to 1e-6. Low-precision rows are cast into one buffer that stays in cache.
    """
    m, d = history.shape
    on_cpu = history.device.type == "cpu"
    if history.dtype == dtype:
        width = 2**15 if on_cpu else 2**20
        for start in range(0, d, width):
            yield slice(None), slice(start, start + width), history[:, start : start + width]
        return
    height, width = (32, 2**15) if on_cpu else (m, max(256, 2**23 // m))
    buffer = torch.empty(min(height, m) * min(width, d), dtype=dtype, device=history.device)
    for start in range(0, d, width):
        columns = slice(start, start + width)
        for first in range(0, m, height):
            rows = slice(first, first + height)
            source = history[rows, columns]
            yield rows, columns, buffer[: source.numel()].view(source.shape).copy_(source)


def _row_scale(x: Tensor, all_reduce: Callable[[Tensor, Any], Tensor] | None) -> Tensor:
    """(1,) power of two that brings the largest entry of ``x`` just under 2¹⁵: float16 then keeps most of its range."""
    largest = x.abs().amax(0, keepdim=True) if x.numel() else x.new_zeros(1)
    if all_reduce is not None:
        largest = all_reduce(largest, dist.ReduceOp.MAX)
    return torch.exp2((torch.frexp(largest).exponent - 15).clamp(-100, 100).to(x.dtype))


def _solve(gram: Tensor, ridge: Tensor, newest: Tensor) -> Tensor:
    """Column ``newest`` of ``(gram + diag(ridge))⁻¹``; of its diagonal alone should it not be positive definite."""
    system = gram + torch.diag(ridge)
    unit = newest.to(gram.dtype)
    factor, info = torch.linalg.cholesky_ex(system)
    return torch.where(info == 0, torch.cholesky_solve(unit[:, None], factor)[:, 0], unit / system.diagonal())


def _inverse(gram: Tensor, ridge: Tensor) -> Tensor:
    """``(gram + diag(ridge))⁻¹``; of its diagonal alone should it not be positive definite."""
    system = gram + torch.diag(ridge)
    factor, info = torch.linalg.cholesky_ex(system)
    return torch.where(info == 0, torch.cholesky_inverse(factor), torch.diag(1 / system.diagonal())).contiguous()


def _exchange_row(window: dict[str, Any], ridge: Tensor, newest: Tensor, accepted: Tensor, damping: float) -> Tensor:
    """Update ``inverse`` after row and column ``newest`` of the Gram matrix changed; return its column ``newest``.

    The old row and column leave by the formula for the inverse of a principal submatrix, the new ones enter by
    bordering: two rank-1 updates whose pivots, unlike the 2 x 2 determinant of a rank-2 Woodbury step, are bounded
    below by the damping.
    """
    gram, index = window["gram"], window["index"]
    if window.get("inverse_damping") != damping or window["inverse_age"] >= len(gram):
        window.update(inverse=_inverse(gram, ridge), inverse_damping=damping, inverse_age=0)
        return window["inverse"].index_select(1, index)[:, 0]
    window["inverse_age"] += 1
    inverse = window["inverse"]
    leaving = inverse.index_select(1, index)[:, 0]
    rest = torch.addr(inverse, leaving, leaving / leaving.index_select(0, index), alpha=-1)
    entering = gram.index_select(0, index)[0].masked_fill(newest, 0)
    projection = rest.mv(entering).masked_fill(newest, 0)
    for _ in range(2):  # iterative refinement: without it the errors of one exchange are amplified by the next
        remainder = entering - gram.mv(projection) - ridge * projection
        projection += rest.mv(remainder.masked_fill(newest, 0)).masked_fill(newest, 0)
    floor = ridge.index_select(0, index)
    pivot = gram.diagonal().index_select(0, index) + floor - entering.dot(projection)
    residual = newest.to(gram.dtype) - projection
    column = residual / torch.maximum(pivot, floor)
    torch.where(accepted, torch.addr(rest, residual, column), inverse, out=inverse)
    return column
