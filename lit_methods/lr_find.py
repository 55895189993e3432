"""Lightning's search for a learning rate, where it cannot mean anything."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.tuner.lr_finder import _LRCallback


def refuse_lr_finder(module: LightningModule) -> None:
    """Raise when ``Tuner.lr_find`` or ``LearningRateFinder`` is at work; call it in ``on_train_start``.

    Under manual optimization it never changes the learning rate, and suggests its lower bound.
    """
    trainer: Any = module.trainer
    if any(isinstance(callback, _LRCallback) for callback in trainer.callbacks):
        raise ValueError(
            f"lr_find cannot choose a learning rate for {type(module).__name__}, which steps its optimizers itself: "
            "compare short runs with different ones instead"
        )
