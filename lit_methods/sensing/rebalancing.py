"""The one extra step that frees gradient descent on ``F G^T`` from its initial scale (arXiv 2310.01769, eq. 5.1)."""

import torch
from torch import Tensor

__all__ = ["rebalance_factors_"]


@torch.no_grad()
def rebalance_factors_(left: Tensor, right: Tensor, beta: float | None = None, rank: int | None = None) -> Tensor:
    """Give all singular values of ``left`` the same size, in place, without changing ``left right^T``.

    With the singular value decomposition ``left = U S V^T``::

        left <- beta U V^T          right <- right V S V^T / beta

    This is the polar form of the paper's step (``beta U`` and ``right V S / beta``): the same up to a rotation of the
    columns, which gradient descent does not see, but it leaves an already rebalanced pair alone and needs no padding
    when there are more columns than rows. Afterwards the squared error of superfluous columns shrinks by
    ``(1 - lr beta^2)^2`` a step. Computed in at least float32. Transformed factors make old momentum meaningless.

    Args:
        left: ``(..., rows, k)``, changed in place.
        right: ``(..., columns, k)``, changed in place.
        beta: the new singular value of ``left``, > 0. Default ``sqrt(sigma_r / 2)``, where ``sigma_r`` is the smallest
            singular value of the product that belongs to the signal.
        rank: number ``r`` of singular values of the product that belong to the signal, for the default ``beta``;
            by default those before the largest ratio between consecutive ones.

    Returns:
        The ``beta`` used, ``(...)``.

    Raises:
        ValueError: shapes that do not match, values that are not finite, ``beta`` or ``rank`` out of range.
    """
    if left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-1] or left.dim() < 2:
        raise ValueError(
            f"left and right must be (..., rows, k) and (..., columns, k), got {tuple(left.shape)} and "
            f"{tuple(right.shape)}"
        )
    if beta is not None and not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, or None, got {beta}")
    if rank is not None and not 1 <= rank <= min(left.shape[-2], right.shape[-2], left.shape[-1]):
        raise ValueError(f"rank must be in [1, min(rows, columns, k)], or None, got {rank}")
    if not (left.isfinite().all() and right.isfinite().all()):
        raise ValueError("left and right must be finite: rebalance before the training diverges, with a smaller lr")
    dtype = torch.promote_types(left.dtype, torch.float32)
    f, g = left.to(dtype), right.to(dtype)
    u, s, vh = torch.linalg.svd(f, full_matrices=False)
    betas = _default_beta(f, g, rank) if beta is None else torch.full_like(s[..., 0], beta)
    scale = betas[..., None, None]
    left.copy_(scale * (u @ vh))
    right.copy_((g @ vh.mT * s[..., None, :]) @ vh / scale)
    return betas


def _default_beta(f: Tensor, g: Tensor, rank: int | None) -> Tensor:
    r1, r2 = torch.linalg.qr(f, mode="r").R, torch.linalg.qr(g, mode="r").R
    s = torch.linalg.svdvals(r1 @ r2.mT)
    largest = s[..., :1].clamp_min(torch.finfo(s.dtype).tiny)
    if rank is None:
        floored = s.clamp_min(torch.finfo(s.dtype).eps * largest)
        followed = torch.cat([floored, floored[..., -1:]], -1)  # without any gap, all values are signal
        ratios = followed[..., :-1] / followed[..., 1:]
        last = torch.where(ratios.amax(-1) > 10, ratios.argmax(-1), s.shape[-1] - 1)
    else:
        last = torch.full_like(s[..., 0], rank - 1, dtype=torch.long)
    signal = s.gather(-1, last[..., None]).squeeze(-1)
    return (signal.clamp_min(torch.finfo(s.dtype).eps * largest[..., 0]) / 2).sqrt()
