"""The one extra step that frees gradient descent on ``F G^T`` from its initial scale (arXiv 2310.01769, eq. 5.1)."""

import torch
from torch import Tensor

__all__ = ["rebalance_factors_"]


@torch.no_grad()
def rebalance_factors_(
    left: Tensor, right: Tensor, beta: float | None = None, rank: int | None = None, max_sharpness: float = 4.0
) -> Tensor:
    """Give all singular values of ``left`` the same size, in place, without changing ``left right^T``.

    With the singular value decomposition ``left = U S V^T``::

        left <- beta U V^T          right <- right V S V^T / beta

    This is the polar form of the paper's step (``beta U`` and ``right V S / beta``): the same up to a rotation of the
    columns, which gradient descent does not see, but it leaves an already rebalanced pair alone and needs no padding
    when there are more columns than rows. Afterwards the squared error of superfluous columns shrinks by
    ``(1 - lr beta^2)^2`` a step. Computed in at least float32. Transformed factors make old momentum meaningless.

    A small ``beta`` makes ``right`` large, and with it the curvature of the loss, which is proportional to the
    sharpness ``s(left)^2 + s(right)^2`` (``s``: largest singular value). A step size that was stable so far is unstable
    afterwards if the sharpness grows too much. The default ``beta`` therefore bounds its growth.

    Where the product is zero, both factors are left alone.

    Args:
        left: ``(..., rows, k)``, changed in place.
        right: ``(..., columns, k)``, changed in place.
        beta: the new singular value of ``left``, > 0. Default ``sqrt(sigma_r / 2)``, where ``sigma_r`` is the smallest
            singular value of the product that belongs to the signal, or as much more as ``max_sharpness`` asks for.
        rank: number ``r`` of singular values of the product that belong to the signal, for the default ``beta``;
            by default those before the largest ratio between consecutive ones.
        max_sharpness: largest sharpness that the default ``beta`` may cause, as a multiple of the present one, >= 1.

    Returns:
        The ``beta`` used, ``(...)``; 0 where the product is zero.

    Raises:
        TypeError: complex or integer factors.
        ValueError: shapes that do not match, values that are not finite, or an argument out of range.
    """
    for name, factor in (("left", left), ("right", right)):
        if not factor.is_floating_point():
            raise TypeError(f"{name} must have a real floating-point dtype, got {factor.dtype}")
    if left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-1] or left.dim() < 2:
        raise ValueError(
            f"left and right must be (..., rows, k) and (..., columns, k), got {tuple(left.shape)} and "
            f"{tuple(right.shape)}"
        )
    if beta is not None and not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, or None, got {beta}")
    if rank is not None and not 1 <= rank <= min(left.shape[-2], right.shape[-2], left.shape[-1]):
        raise ValueError(f"rank must be in [1, min(rows, columns, k)], or None, got {rank}")
    if not 1 <= max_sharpness < float("inf"):
        raise ValueError(f"max_sharpness must be >= 1 and finite, got {max_sharpness}")
    if not (left.isfinite().all() and right.isfinite().all()):
        raise ValueError("left and right must be finite: rebalance before the training diverges, with a smaller lr")
    dtype = torch.promote_types(left.dtype, torch.float32)
    f, g = left.to(dtype), right.to(dtype)
    u, s, vh = torch.linalg.svd(f, full_matrices=False)
    sigma = product_singular_values(f, g)
    if beta is None:
        betas = _default_beta(sigma, s[..., 0].square() + _largest(g).square(), rank, max_sharpness)
    else:
        betas = torch.full_like(s[..., 0], beta)
    zero = (sigma[..., 0] == 0)[..., None, None]
    scale = betas[..., None, None]
    new_left = scale * (u @ vh)
    new_right = (g @ vh.mT * s[..., None, :]) @ vh / scale
    left.copy_(torch.where(zero, f, new_left))
    right.copy_(torch.where(zero, g, new_right))
    return torch.where(zero[..., 0, 0], 0, betas)


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Those singular values of ``left right^T`` that may differ from zero, descending."""
    r1, r2 = torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right, mode="r").R
    return torch.linalg.svdvals(r1 @ r2.mT)


def _largest(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x)[..., 0]


def _default_beta(sigma: Tensor, sharpness: Tensor, rank: int | None, max_sharpness: float) -> Tensor:
    eps = torch.finfo(sigma.dtype).eps
    largest = sigma[..., 0].clamp_min(torch.finfo(sigma.dtype).tiny)
    if rank is None:
        floored = sigma.clamp_min(eps * largest[..., None])
        followed = torch.cat([floored, floored[..., -1:]], -1)  # without any gap, all values are signal
        ratios = followed[..., :-1] / followed[..., 1:]
        last = torch.where(ratios.amax(-1) > 10, ratios.argmax(-1), sigma.shape[-1] - 1)
    else:
        last = torch.full_like(sigma[..., 0], rank - 1, dtype=torch.long)
    signal = sigma.gather(-1, last[..., None]).squeeze(-1).clamp_min(eps * largest)
    # The sharpness will be b + sigma_1^2 / b for b = beta^2; it is 2 sigma_1 for b = sigma_1, and never was smaller.
    multiple = (max_sharpness * sharpness / (2 * largest)).clamp_min(1)
    least = largest / (multiple + (multiple - 1).sqrt() * (multiple + 1).sqrt())
    return torch.maximum(signal / 2, least).sqrt()
