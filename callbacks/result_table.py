"""The numbers a run ends with."""

from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lit_methods.callbacks.evaluation import can_evaluate, evaluate_after_fit


class ResultTable(Callback):
    """Evaluate the best checkpoint when ``fit`` ends and print its metrics as one table, on rank zero.

    The best checkpoint is that of the first ``ModelCheckpoint`` that monitors a metric; without one, the weights at the
    end of training are evaluated. A module or data without a test loop are evaluated in validation, and without that
    neither is there a table; a warning says so when ``fit`` starts. The metrics are also in ``results`` afterwards.

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
        self._possible: Literal["test", "validate"] | None = stage

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look which loops the module and the data have."""
        stages: tuple[Literal["test", "validate"], ...] = (self.stage, "validate")
        self._possible = next((stage for stage in stages if can_evaluate(trainer, pl_module, stage)), None)
        if self._possible != self.stage:
            instead = "evaluates in validation instead" if self._possible else "leaves the table out"
            rank_zero_warn(f"{type(pl_module).__name__} or its data have no {self.stage} loop: ResultTable {instead}.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate and print."""
        if self._possible is None:
            return
        checkpoint = next((c.best_model_path for c in _checkpoints(trainer) if c.monitor and c.best_model_path), None)
        self.results = evaluate_after_fit(trainer, pl_module, self._possible, checkpoint)
        if trainer.is_global_zero and self.results:
            width = max(map(len, self.results))
            lines = [f"{metric:<{width}}  {value:.4f}" for metric, value in sorted(self.results.items())]
            title = f"best checkpoint: {checkpoint}" if checkpoint else "weights at the end of training"
            print("\n".join(["", title, *lines]))


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
