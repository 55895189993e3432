"""Evaluation loops that a callback starts when ``fit`` ends."""

from copy import copy
from typing import Literal

from lightning.pytorch import LightningModule, Trainer


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
    evaluate = trainer.test if stage == "test" else trainer.validate
    per_loader = evaluate(
        pl_module, datamodule=getattr(trainer, "datamodule", None), ckpt_path=ckpt_path, verbose=False
    )
    trainer.state = state
    return {name: value for metrics in per_loader for name, value in metrics.items()}
