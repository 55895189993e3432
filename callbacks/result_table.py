"""The numbers a run ends with."""

from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_methods.callbacks.evaluation import evaluate_after_fit


class ResultTable(Callback):
    """Evaluate the best checkpoint when ``fit`` ends and print its metrics as one table, on rank zero.

    The best checkpoint is that of the first ``ModelCheckpoint`` that monitors a metric; without one, the weights at the
    end of training are evaluated. The metrics are also in ``results`` afterwards.

    Args:
        stage: run the test loop or the validation loop.

    Raises:
        ValueError: ``stage`` is neither ``"test"`` nor ``"validate"``.
    """

    def __init__(self, stage: Literal["test", "validate"] = "test") -> None:
        if stage not in ("test", "validate"):
            raise ValueError(f"stage must be 'test' or 'validate', got {stage!r}")
        self.stage = stage
        self.results: dict[str, float] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate and print."""
        checkpoint = next((c.best_model_path for c in _checkpoints(trainer) if c.monitor and c.best_model_path), None)
        self.results = evaluate_after_fit(trainer, pl_module, self.stage, checkpoint)
        if trainer.is_global_zero:
            width = max(map(len, self.results))
            lines = [f"{metric:<{width}}  {value:.4f}" for metric, value in sorted(self.results.items())]
            title = f"best checkpoint: {checkpoint}" if checkpoint else "weights at the end of training"
            print("\n".join(["", title, *lines]))


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
