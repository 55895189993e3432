"""What SSO does inside of its steps."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_methods.optim import SSO


class SurrogateMonitor(Callback):
    """Log how :class:`~lit_methods.optim.SSO` steps, every few steps.

    ``surrogate/eta`` (η), ``surrogate/inner_steps``, ``surrogate/inner_step_size``, ``surrogate/decrease`` (of S by
    the inner steps) and ``surrogate/target_grad_norm``. With ``criterion`` also ``surrogate/loss_ratio``, the batch's
    loss decrease over the surrogate's: at least 1 where η <= 1/L, and far below 1 where η is too long. The values are
    also in ``history``. Warns when the Trainer clips gradients, which SSO does not use.

    Args:
        every_n_steps: >= 1.
        criterion: loss of (pl_module, batch), evaluated without gradients in evaluation mode before and after the
            step (so the ratio is exact for networks without dropout and batch normalisation); None: no ratio. Not
            with accumulated gradients.

    Attributes:
        history: one dict per logged step: ``step`` and the values.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(
        self, every_n_steps: int = 1, criterion: Callable[[LightningModule, Any], Tensor] | None = None
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.criterion = criterion
        self.history: list[dict[str, float]] = []
        self._loss_before: float | None = None
        self._step_before = 0

    def state_dict(self) -> dict[str, Any]:
        """The values so far."""
        return {"history": [dict(row) for row in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint."""
        self.history = [dict(row) for row in state_dict["history"]]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of gradient clipping."""
        if trainer.gradient_clip_val and _sso(trainer) is not None:
            rank_zero_warn("gradient_clip_val does nothing to SSO; use its max_target_grad_norm")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the loss before the step."""
        self._step_before = trainer.global_step
        self._loss_before = None
        due = (trainer.global_step + 1) % self.every_n_steps == 0
        if due and self.criterion is not None and trainer.accumulate_grad_batches == 1 and _sso(trainer) is not None:
            self._loss_before = self._loss(pl_module, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        optimizer = _sso(trainer)
        if optimizer is None or trainer.global_step == self._step_before or trainer.global_step % self.every_n_steps:
            return
        metrics = optimizer.get_metrics()
        values = {name: value for name, value in metrics.items() if name not in ("loss", "surrogate_decrease")}
        if metrics:
            values["decrease"] = metrics["surrogate_decrease"]
        if self._loss_before is not None and values.get("decrease"):
            values["loss_ratio"] = (self._loss_before - self._loss(pl_module, batch)) / values["decrease"]
        self.history.append({"step": trainer.global_step, **values})
        pl_module.log_dict({f"surrogate/{name}": float(value) for name, value in values.items()}, sync_dist=True)

    @torch.no_grad()
    def _loss(self, pl_module: LightningModule, batch: Any) -> float:
        assert self.criterion is not None
        modes = {name: part.training for name, part in pl_module.named_modules()}
        pl_module.eval()
        loss = float(self.criterion(pl_module, batch))
        for name, part in pl_module.named_modules():
            part.training = modes[name]
        return loss


def _sso(trainer: Trainer) -> SSO | None:
    return next((optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SSO)), None)
