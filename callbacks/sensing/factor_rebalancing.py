"""The one-step modification of gradient descent on two factors, for any module with pairs of factors."""

import re
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_methods.sensing import rebalance_factors_


class FactorRebalancing(Callback):
    """Rebalance pairs of factors once during training, with :func:`~lit_methods.sensing.rebalance_factors_`.

    From then on an over-parameterised product ``F G^T`` trains at a rate that no longer depends on how small its
    factors started (arXiv 2310.01769, eq. 5.1). The product does not change. Optimizer state of the factors (momentum,
    Adam moments) belongs to the old coordinates and is dropped, with a log message: moments of squares have no new
    coordinates, and those of a momentum would be divided by the smallest singular value of ``F``.

    It fires after the optimizer step ``at_step``; or, without ``at_step``, as soon as the training loss has fallen
    below ``loss_fraction`` of its first value, or by less than 20 % within the last 50 steps after it had halved. (The
    second way reads the loss at every step, which on CUDA waits for the device.) The pairs are found by name::

        FactorRebalancing()                                           # AsymmetricSensing
        FactorRebalancing("(.*)lora_B(.*)", r"\\1lora_A\\2", True)      # LoRA of peft: lora_B (out, r), lora_A (r, in)

    With several ranks, rank zero computes and broadcasts; sharded factors (FSDP2, DTensor) are gathered pair by pair.

    Args:
        left: regular expression that the whole name of a left factor's parameter ``(..., rows, k)`` matches.
        right: the name of its right factor ``(..., columns, k)``, a replacement template for ``left``.
        right_is_transposed: the right factor is stored as ``(..., k, columns)``.
        at_step: number of optimizer steps after which to fire, >= 1; ``None``: decided by the loss.
        loss_fraction: fraction of the first training loss, in (0, 1).
        beta: new singular value of the left factors, > 0; ``None``: half the signal's smallest singular value, rooted.
        rank: rank of the signal, for the default ``beta``; ``None``: by the largest gap.

    Raises:
        ValueError: an argument out of range; when training starts: no parameter matches, or one has no partner; without
            ``at_step``: ``training_step`` returns no loss, as with manual optimization.
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
            raise ValueError(f"at_step must be at least 1, or None, got {at_step}")
        if not 0 < loss_fraction < 1:
            raise ValueError(f"loss_fraction must be in (0, 1), got {loss_fraction}")
        if beta is not None and not 0 < beta < float("inf"):
            raise ValueError(f"beta must be > 0 and finite, or None, got {beta}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, or None, got {rank}")
        self.left = left
        self.right = right
        self.right_is_transposed = right_is_transposed
        self.at_step = at_step
        self.loss_fraction = loss_fraction
        self.beta = beta
        self.rank = rank
        self.fired_at: int | None = None
        self.betas: list[float] = []  # those used, pair by pair; on rank zero
        self.losses: list[float] = []  # the first, and the last 50
        self.steps = 0  # optimizer steps when the last batch ended

    def state_dict(self) -> dict[str, Any]:
        """When it fired and with which ``beta``, and the losses that decide."""
        return {"fired_at": self.fired_at, "betas": list(self.betas), "losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.fired_at = state_dict["fired_at"]
        self.betas = list(state_dict["betas"])
        self.losses = list(state_dict["losses"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse modules without pairs before anything is trained."""
        self._pairs(pl_module)
        self.steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fire when it is time: after an optimizer step, since gradients may not accumulate over the change."""
        stepped, self.steps = trainer.global_step > self.steps, trainer.global_step
        if self.fired_at is None and stepped and self._is_time(trainer, outputs):
            self._fire(trainer, pl_module)

    def _is_time(self, trainer: Trainer, outputs: Any) -> bool:
        if self.at_step is not None:
            return trainer.global_step >= self.at_step
        if not outputs or "loss" not in outputs:
            raise ValueError("at_step=None decides by the loss, which training_step does not return: set at_step")
        loss = outputs["loss"].detach().clone()
        if trainer.world_size > 1:  # ranks must decide alike
            dist.all_reduce(loss)
            loss /= trainer.world_size
        self.losses.append(float(loss))
        first, last = self.losses[0], self.losses[-1]
        before = self.losses[-51] if len(self.losses) > 51 else None
        del self.losses[1:-51]
        stalls = before is not None and before < 0.5 * first and last > 0.8 * before
        return last < self.loss_fraction * first or stalls

    def _fire(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for pair in self._pairs(pl_module):
            left, right = (p.full_tensor() if isinstance(p, DTensor) else p for p in (factor.data for factor in pair))
            if trainer.is_global_zero:
                right_factor = right.mT if self.right_is_transposed else right
                self.betas += rebalance_factors_(left, right_factor, self.beta, self.rank).flatten().tolist()
            for factor, new in zip(pair, (left, right), strict=True):
                if trainer.world_size > 1:
                    dist.broadcast(new, 0)
                if isinstance(factor.data, DTensor):
                    factor.data.copy_(distribute_tensor(new, factor.data.device_mesh, factor.data.placements))
                for optimizer in trainer.optimizers:
                    optimizer.state.pop(factor, None)
        self.fired_at = trainer.global_step
        rank_zero_info(f"FactorRebalancing: after step {self.fired_at}; the factors' optimizer state starts anew.")

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
