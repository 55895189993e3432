"""The one-step modification of gradient descent on two factors, for any module with pairs of factors."""

import re
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_methods.sensing import rebalance_factors_
from lit_methods.sensing.rebalancing import product_singular_values

_WINDOW = 50  # steps over which losses are compared
_LOOK = 100  # steps between looks at the singular values


class FactorRebalancing(Callback):
    """Rebalance pairs of factors once during training, with :func:`~lit_methods.sensing.rebalance_factors_`.

    From then on an over-parameterised product ``F G^T`` trains at a rate that no longer depends on how small its
    factors started (arXiv 2310.01769, eq. 5.1). The product does not change. Optimizer state of the factors (momentum,
    Adam moments) belongs to the old coordinates and is dropped, with a log message: moments of squares have no new
    coordinates, and those of a momentum would be divided by the smallest singular value of ``F``.

    **When.** After the optimizer step ``at_step``. Without ``at_step``: once the training loss has fallen below
    ``loss_fraction`` of its first value, or has halved and then lost less than 20 % within 50 steps, *and* no singular
    value of a product has grown by more than a tenth within 100 steps. (At a plateau before the last part of the signal
    is learned, one still grows.) The second way reads the loss at every step, which on CUDA waits for the device. For
    LoRA, whose updates grow for as long as it trains, set ``at_step``.

    **With which beta.** A small ``beta`` makes the right factors large and the loss steep. The default lets the
    sharpness of a pair, on which the largest stable step size depends, grow at most fourfold. If the loss rises all the
    same, to more than twice the largest of the 50 losses before within 50 steps, the factors from before are put back,
    with a warning; then it fires again with half the growth, and after the third time, or with a ``beta`` of yours, no
    more. Pairs whose product is zero are left alone.

    The pairs are found by name::

        FactorRebalancing()                                           # AsymmetricSensing
        FactorRebalancing("(.*)lora_B(.*)", r"\\1lora_A\\2", True)      # LoRA of peft: lora_B (out, r), lora_A (r, in)

    With several ranks, rank zero computes and broadcasts; sharded factors (FSDP2, DTensor) are gathered pair by pair.

    Args:
        left: regular expression that the whole name of a left factor's parameter ``(..., rows, k)`` matches.
        right: the name of its right factor ``(..., columns, k)``, a replacement template for ``left``.
        right_is_transposed: the right factor is stored as ``(..., k, columns)``.
        at_step: number of optimizer steps after which to fire, >= 1; ``None``: decided by the loss.
        loss_fraction: fraction of the first training loss, in (0, 1).
        beta: new singular value of the left factors, > 0; ``None``: half the signal's smallest singular value, rooted,
            or more where that would make the pair too sharp.
        rank: rank of the signal, for the default ``beta``; ``None``: by the largest gap.

    Raises:
        ValueError: an argument out of range; when training starts: no parameter matches, or one has no partner; without
            ``at_step``: ``training_step`` returns no loss, as with manual optimization.
        TypeError: when it fires, complex or integer factors.
    """

    def __init__(
        self,
        left: str = r"(.*\.)?left",
        right: str = r"\1right",
        right_is_transposed: bool = False,
        at_step: int | None = None,
        loss_fraction: float = 0.01,
        beta: float | None = None,
        rank: int | None = None,
    ) -> None:
        if at_step is not None and at_step < 1:
            raise ValueError(f"at_step must be >= 1, or None, got {at_step}")
        if not 0 < loss_fraction < 1:
            raise ValueError(f"loss_fraction must be in (0, 1), got {loss_fraction}")
        if beta is not None and not 0 < beta < float("inf"):
            raise ValueError(f"beta must be > 0 and finite, or None, got {beta}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be >= 1, or None, got {rank}")
        self.left = left
        self.right = right
        self.right_is_transposed = right_is_transposed
        self.at_step = at_step
        self.loss_fraction = loss_fraction
        self.beta = beta
        self.rank = rank
        self.fired_at: int | None = None
        self.betas: list[float] = []  # those used, pair by pair; on rank zero
        self.losses: list[float] = []  # the first, and the last 51
        self.max_sharpness = 4.0  # as a multiple of the pair's sharpness before the firing
        self.loss_bound: float | None = None  # above it, the firing is taken back
        self.factors_before: list[Tensor] = []  # while it may still be taken back
        self.singular_values: list[Tensor] = []  # of the products, when last looked at
        self.steps = 0  # optimizer steps when the last batch ended

    def state_dict(self) -> dict[str, Any]:
        """When it fired and with which ``beta``, what decides that, and what it takes to undo it."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        for name in _STATE & state_dict.keys():
            value = state_dict[name]
            setattr(self, name, list(value) if isinstance(value, list) else value)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse modules without pairs before anything is trained."""
        self._pairs(pl_module)
        self.steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fire when it is time: after an optimizer step, since gradients may not accumulate over the change."""
        stepped, self.steps = trainer.global_step > self.steps, trainer.global_step
        if not stepped or self.max_sharpness < 1:
            return
        waits = self.fired_at is None
        if (waits if self.at_step is None else abs(self.steps - self.at_step) <= _WINDOW) or self.factors_before:
            self._take_loss(trainer, outputs)
        if waits and self._is_time(trainer, pl_module):
            self.fire(trainer, pl_module)
        elif self.factors_before:
            self._check(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if it never fired."""
        if self.fired_at is None and self.max_sharpness >= 1:
            rank_zero_info("FactorRebalancing did not fire: set at_step, or train for longer.")

    def _take_loss(self, trainer: Trainer, outputs: Any) -> None:
        if not outputs or "loss" not in outputs:
            if self.at_step is None:
                raise ValueError("at_step=None decides by the loss, which training_step does not return: set at_step")
            return
        loss = outputs["loss"].detach().clone()
        if trainer.world_size > 1:  # ranks must decide alike
            dist.all_reduce(loss)
            loss /= trainer.world_size
        self.losses.append(float(loss))
        del self.losses[1 : -_WINDOW - 1]

    def _is_time(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        if self.at_step is not None:
            return trainer.global_step >= self.at_step
        first, last = self.losses[0], self.losses[-1]
        before = self.losses[1] if len(self.losses) > _WINDOW + 1 else None
        stalls = before is not None and before < 0.5 * first and last > 0.8 * before
        looks = trainer.global_step % _LOOK == 0 and (last < self.loss_fraction * first or stalls)
        return looks and trainer.strategy.reduce_boolean_decision(self._is_settled(pl_module))

    def _is_settled(self, pl_module: LightningModule) -> bool:
        """Whether no singular value of a product that is above rounding errors has grown by a tenth."""
        before, self.singular_values = self.singular_values, []
        for left, right in self._pairs(pl_module):
            f, g = (p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in map(_whole, (left, right)))
            self.singular_values.append(product_singular_values(f, g.mT if self.right_is_transposed else g))
        return bool(before) and not any(
            ((now > 1.1 * old.to(now)) & (now > 100 * torch.finfo(now.dtype).eps * now[..., :1])).any()
            for old, now in zip(before, self.singular_values, strict=True)
        )

    def fire(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rebalance all pairs now, and forget the moments of the Trainer's optimizers."""
        pairs = self._pairs(pl_module)
        self.betas = []
        if self.losses:
            self.loss_bound = self.loss_bound or 2 * max(self.losses[-_WINDOW - 1 :])
            self.factors_before = [_whole(factor).detach().clone() for pair in pairs for factor in pair]
        for pair in pairs:
            left, right = (_whole(factor).detach() for factor in pair)
            if trainer.is_global_zero:
                right_factor = right.mT if self.right_is_transposed else right
                betas = rebalance_factors_(left, right_factor, self.beta, self.rank, self.max_sharpness)
                self.betas += betas.flatten().tolist()
            for factor, new in zip(pair, (left, right), strict=True):
                if trainer.world_size > 1:
                    dist.broadcast(new, 0)
                _replace(trainer, factor, new)
        self.fired_at = trainer.global_step
        rank_zero_info(f"FactorRebalancing: after step {self.fired_at}; the factors' optimizer state starts anew.")

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the firing back if the loss has risen, and forget how to after 50 steps."""
        assert self.fired_at is not None
        assert self.loss_bound is not None
        if not self.losses[-1] <= self.loss_bound:
            factors = [factor for pair in self._pairs(pl_module) for factor in pair]
            for factor, old in zip(factors, self.factors_before, strict=True):
                _replace(trainer, factor, old.to(factor.device))
            self.max_sharpness = 0.0 if self.beta is not None else self.max_sharpness / 2
            rank_zero_warn(
                f"FactorRebalancing: the loss rose to {self.losses[-1]:.3g} after the firing at step {self.fired_at} "
                f"with beta {self.betas}. The factors from before are back; "
                + ("it will not fire again." if self.max_sharpness < 1 else "the next beta will be larger.")
            )
            self.fired_at, self.factors_before = None, []
            self.losses = self.losses[:1]  # those since the firing say nothing about the next
        elif self.steps >= self.fired_at + _WINDOW:
            self.factors_before = []

    def _pairs(self, pl_module: LightningModule) -> list[tuple[nn.Parameter, nn.Parameter]]:
        parameters = dict(pl_module.named_parameters())
        pairs = []
        for name in parameters:
            if match := re.fullmatch(self.left, name):
                partner = match.expand(self.right)
                if partner not in parameters:
                    raise ValueError(f"right={self.right!r} gives {partner!r} for {name!r}, which is no parameter")
                pairs.append((parameters[name], parameters[partner]))
        if not pairs:
            raise ValueError(f"left={self.left!r} matches none of the parameters {sorted(parameters)}")
        return pairs


_STATE = {
    "fired_at",
    "betas",
    "losses",
    "max_sharpness",
    "loss_bound",
    "factors_before",
    "singular_values",
}


def _whole(factor: nn.Parameter) -> Tensor:
    data = factor.data
    return data.full_tensor() if isinstance(data, DTensor) else data


def _replace(trainer: Trainer, factor: nn.Parameter, new: Tensor) -> None:
    """Write ``new`` into a factor, whose optimizer state belongs to the old coordinates and goes."""
    if isinstance(factor.data, DTensor):
        new = distribute_tensor(new, factor.data.device_mesh, factor.data.placements)
    factor.data.copy_(new)
    for optimizer in trainer.optimizers:
        optimizer.state.pop(factor, None)
