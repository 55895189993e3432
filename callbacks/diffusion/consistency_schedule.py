"""Bringing the two times of consistency training closer as it goes on."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_methods.diffusion import FlowMap


class ConsistencySchedule(Callback):
    """Move a :class:`~lit_methods.diffusion.FlowMap` to its next stage every so many steps (arXiv 2406.14548).

    The stage is a function of ``trainer.global_step``, so there is nothing to save.

    Args:
        every_n_steps: steps of a stage, >= 1; published runs take 12,500 thousand images.

    Raises:
        ValueError: an argument out of range, or another module.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other modules."""
        if not isinstance(pl_module, FlowMap):
            raise ValueError(f"ConsistencySchedule needs a FlowMap, got {type(pl_module).__name__}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the stage."""
        assert isinstance(pl_module, FlowMap)
        pl_module.stage = trainer.global_step // self.every_n_steps
