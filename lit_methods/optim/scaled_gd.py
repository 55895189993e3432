"""Gradient descent on factors of a matrix, preconditioned so that the rate is free of the condition number.

Tong, Ma and Chi, *Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent*, JMLR 2021
(arXiv 2005.08898); with damping, for more columns than the rank, Xu, Shen, Chi and Ma, *The Power of Preconditioning in
Overparameterized Low-Rank Matrix Sensing*, ICML 2023 (arXiv 2302.01186). The baseline of
:mod:`lit_methods.sensing`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lit_methods.optim.foundation.finite import gradients_are_finite, warn_of_skipped_step
from lit_methods.optim.foundation.groups import check_gradients, check_lr, check_own_state

__all__ = ["ScaledGD"]


class ScaledGD(Optimizer):
    """``F <- F - lr dF (G^T G + damping I)^-1`` and ``G <- G - lr dG (F^T F + damping I)^-1``, at once.

    A parameter group is one such pair, ``F`` ``(..., rows, k)`` and ``G`` ``(..., columns, k)``, or a single ``X`` of
    ``X X^T``, which is its own partner. Computed in at least float32. It keeps no state. A step synchronises once with
    the host, to see whether the gradients are finite: if not, it changes nothing, and the first such step warns. Ranks
    (DDP) take the same step from the averaged gradients.

    Args:
        params: the two factors or the single one; several pairs as groups; named parameters.
        lr: step, >= 0. The preconditioner takes out the scale of the matrix, so that 0.5 suits small and large.
        damping: ``lambda`` >= 0, of the order of the smallest singular value of the signal; 0 (the first paper) only
            while the factors keep their full rank. ``None``: plain gradient descent, for groups that hold anything else
            (biases, heads).

    Raises:
        ValueError: an argument out of range, or a group with ``damping`` that is no pair of factors.
        RuntimeError: in :meth:`step`: sparse gradients.

    Example:
        >>> import torch
        >>> f, g = torch.eye(3, 2).requires_grad_(), torch.ones(4, 2, requires_grad=True)
        >>> optimizer = ScaledGD([f, g], damping=0.1)
        >>> (f @ g.T).square().sum().backward()
        >>> optimizer.step()
    """

    def __init__(self, params: ParamsT, lr: float = 0.5, damping: float | None = 0.1) -> None:
        super().__init__(params, {"lr": lr, "damping": damping})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a pair of factors, or a single one."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; factors without a gradient stay.

        Args:
            closure: computes the loss, calls backward and returns the loss.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        check_gradients(params, "ScaledGD")
        if not gradients_are_finite(params):
            warn_of_skipped_step(self)
            return loss
        for group in self.param_groups:
            factors = group["params"]
            partners = [None] * len(factors) if group["damping"] is None else reversed(factors)
            steps = [
                _direction(f.grad, partner, group["damping"]) for f, partner in zip(factors, partners, strict=True)
            ]
            for factor, direction in zip(factors, steps, strict=True):
                if direction is not None:
                    factor.add_(direction.to(factor.dtype), alpha=-group["lr"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the groups' settings; there is no other state.

        Raises:
            ValueError: the state is another optimizer's.
        """
        check_own_state(self, state_dict, set())
        super().load_state_dict(state_dict)


def _direction(gradient: Tensor | None, partner: Tensor | None, damping: float) -> Tensor | None:
    if gradient is None:
        return None
    if partner is None:
        return gradient
    dtype = torch.promote_types(partner.dtype, torch.float32)
    gram = partner.mT.to(dtype) @ partner.to(dtype)
    gram.diagonal(dim1=-2, dim2=-1).add_(damping)
    return gradient.to(dtype) @ torch.linalg.inv_ex(gram).inverse  # unlike solve, it does not wait for the device


def _check_group(group: dict[str, Any]) -> None:
    lr, damping, factors = group["lr"], group["damping"], group["params"]
    check_lr(lr)
    if not all(p.is_floating_point() for p in factors):
        raise ValueError("params must be real floating point (complex: view as real)")
    if damping is None:
        return
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be >= 0 and finite, or None, got {damping}")
    kinds = {(*p.shape[:-2], *p.shape[-1:]) for p in factors}
    if len(factors) > 2 or len(kinds) != 1 or any(p.ndim < 2 for p in factors):
        raise ValueError(
            "params must be two factors (..., rows, k) and (..., columns, k), or a single one, got shapes "
            f"{[tuple(p.shape) for p in factors]}: give each pair a group, and what is no factor one with damping=None"
        )
