"""Evaluation loops that a callback starts when ``fit`` ends."""

from copy import copy
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden


def can_evaluate(trainer: Trainer, pl_module: LightningModule, stage: Literal["test", "validate"]) -> bool:
    """Whether the module has a step for this stage, and somebody has data for it."""
    name = "test" if stage == "test" else "val"
    datamodule = getattr(trainer, "datamodule", None)
    source = f"{name}_dataloader"
    has_data = is_overridden(source, pl_module) or (datamodule is not None and is_overridden(source, datamodule))
    if stage == "validate":
        has_data = trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()
    return has_data and is_overridden("test_step" if stage == "test" else "validation_step", pl_module)


def evaluate_after_fit(
    trainer: Trainer,
    pl_module: LightningModule,
    stage: Literal["test", "validate"] = "test",
    ckpt_path: str | None = None,
) -> dict[str, float]:
    """Run the test or validation loop inside ``on_fit_end`` and return what the module logged.

    The loop is a run of its own; the Trainer's state is put back afterwards, since ``fit`` still has to tear down.
    """
    state = copy(trainer.state)
    datamodule = getattr(trainer, "datamodule", None)
    evaluate = trainer.test if stage == "test" else trainer.validate
    given = trainer.val_dataloaders if stage == "validate" and datamodule is None else None  # to `fit` itself
    per_loader = evaluate(pl_module, given, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
    trainer.state = state
    return {name: value for metrics in per_loader for name, value in metrics.items()}
