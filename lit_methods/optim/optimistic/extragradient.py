"""Extragradient: look ahead, and step from where you stood with the gradient seen there; two gradients a round.

Korpelevich (1976); for GANs Gidel, Berard, Vignoud, Vincent, Lacoste-Julien, "A Variational Inequality Perspective on
Generative Adversarial Networks", ICLR 2019, arXiv 1802.10551 (algorithm 2, and algorithm 4 for ExtraAdam).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_methods.optim.foundation.closures import RepeatedClosure
from lit_methods.optim.foundation.flat import local_tensor
from lit_methods.optim.optimistic.adam import adam_directions, check_adam_group
from lit_methods.optim.optimistic.base import OnlineOptimizer, loss_gradient

__all__ = ["ExtraAdam", "ExtraGradient"]


class _Extrapolating(OnlineOptimizer):
    """``extrapolation()`` and ``step()``; subclasses give the direction of a move."""

    takes_dtensors = True
    gradients_cleared = False
    _skips_round = False  # between extrapolation and step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.gradients_cleared = True
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def extrapolation(self) -> None:
        """Move the parameters to the look-ahead point, remembering where they were.

        With a gradient that is not finite they stay, and :meth:`step` takes nothing but the round's end.

        Raises:
            RuntimeError: called twice without :meth:`step` between.
        """
        active = self._active()
        moving = [p for _, params in active for p in params]
        if any("origin" in self.state[p] for p in moving):
            raise RuntimeError("extrapolation() was called twice; call step() with the gradient at the new point")
        self._skips_round = not self._accepts(moving)
        for group, params in active:
            directions = None if self._skips_round else self._directions(group, params)
            for p in params:
                self.state[p]["origin"] = p.detach().clone()
            if directions is not None:
                _descend(params, directions, group["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step from the point before the extrapolation, with the gradient at the look-ahead point.

        With a closure the whole round is done, and the closure called twice: at the point and at the look-ahead point.

        Returns:
            The loss at the point where the round began, or None without a closure.

        Raises:
            RuntimeError: without a closure and without :meth:`extrapolation` before; accumulated gradients.
        """
        loss = None
        if closure is not None:
            evaluate = RepeatedClosure(self, closure)
            loss = evaluate()
            self.extrapolation()
            evaluate()
        active = self._active()
        moving = [p for _, params in active for p in params]
        if any("origin" not in self.state[p] for p in moving):
            raise RuntimeError(
                f"{type(self).__name__}.step needs extrapolation() before it, or a closure, which a GradScaler "
                "(16-mixed) does not pass: use bf16-mixed, or manual optimization"
            )
        skip = self._skips_round or not self._accepts(moving)
        for group, params in active:
            directions = None if skip else self._directions(group, params)
            for p in params:
                p.copy_(self.state[p].pop("origin"))
            if directions is not None:
                _descend(params, directions, group["lr"])
        return loss

    def _active(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        active = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["lr"] == 0:
                self._directions(group, params)  # makes the state that a checkpoint is loaded into
            elif params:
                active.append((group, params))
        return active

    def _directions(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        if not 0 <= group["weight_decay"] < float("inf"):
            raise ValueError(f"weight_decay must be >= 0 and finite, got {group['weight_decay']}")


class ExtraGradient(_Extrapolating):
    r"""Extragradient: :math:`y = x - lr\,g(x)`, then :math:`x \leftarrow x - lr\,g(y)`.

    Give :meth:`step` a closure (any Trainer does; it runs ``training_step`` twice), or call :meth:`extrapolation` after
    the first backward pass and ``step()`` after the second. Between the two, 4 bytes a parameter. The form with one
    gradient a round is :class:`~lit_methods.optim.OptimisticOMD` with a constant step. ``lr = 0`` pauses a group. Each
    of the two moves synchronises once with the host, to see whether the gradients are finite: if not, the round ends
    where it began, and the first such round warns.

    Args:
        params: parameters, named parameters or groups; DTensors are used shard by shard.
        lr: step size, >= 0.
        weight_decay: L2 coefficient >= 0, part of the loss.
        maximize: ascend.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: in :meth:`step`, for sparse gradients, or without closure and extrapolation.
    """

    state_names = ("origin",)

    def __init__(self, params: ParamsT, lr: float = 1e-2, weight_decay: float = 0.0, *, maximize: bool = False) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})

    def _directions(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        return [loss_gradient(p, group) for p in params]


class ExtraAdam(_Extrapolating):
    """Extragradient whose two moves are Adam steps; the moments see both gradients of a round.

    Used like :class:`ExtraGradient`. State: 8 bytes a parameter, and 4 more between the two moves. Each of the two
    moves synchronises once with the host, to see whether the gradients are finite: if not, the round ends where it
    began, and the first such round warns; the moments keep the first gradient if the second is not finite.

    Args:
        params: parameters, named parameters or groups; DTensors are used shard by shard.
        lr: step size, >= 0.
        betas: decay of the two moments, each in [0, 1).
        eps: > 0.
        weight_decay: L2 coefficient >= 0, part of the loss.
        maximize: ascend.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: in :meth:`step`, for sparse gradients, or without closure and extrapolation.
    """

    state_names = (
        "origin",
        "rounds",
        "exp_avg",
        "exp_avg_sq",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_adam_group(group)

    def _directions(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        return adam_directions(group, params, [self.state[p] for p in params])


def _descend(params: list[Tensor], directions: list[Tensor], lr: float) -> None:
    torch._foreach_add_([local_tensor(p) for p in params], directions, alpha=-lr)
