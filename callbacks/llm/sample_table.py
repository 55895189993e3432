"""A look at what the model writes."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_methods.callbacks.figures import output_dir


class SampleTable(Callback):
    """Append the first held-out prompts and responses to ``<log folder>/samples.md`` at every validation.

    For modules whose validation step returns ``prompts``, ``responses`` and ``lengths``. Goes to loggers that take
    texts (TensorBoard) or tables (Weights & Biases), too. Rank zero only.

    Args:
        num_prompts: rows per table, at least 1.
        max_characters: longer texts are cut, at least 1.
    """

    def __init__(self, num_prompts: int = 8, max_characters: int = 400) -> None:
        if num_prompts < 1 or max_characters < 1:
            raise ValueError(
                f"num_prompts and max_characters must be 1 or more, got {num_prompts} and {max_characters}"
            )
        self.num_prompts = num_prompts
        self.max_characters = max_characters
        self._rows: list[tuple[str, str, str]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new table."""
        self._rows = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take rows until the table is full."""
        for prompt, response, length in zip(outputs["prompts"], outputs["responses"], outputs["lengths"], strict=True):
            if len(self._rows) < self.num_prompts:
                text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                self._rows.append((self._cell(text), self._cell(response), str(length)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        folder = output_dir(trainer)  # a collective call
        if trainer.sanity_checking or not trainer.is_global_zero or not self._rows:
            return
        header = ("prompt", "response", "tokens")
        lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * 3, *self._rows)]
        table = "\n".join(lines)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "samples.md", "a", encoding="utf-8") as file:
            file.write(f"## step {trainer.global_step}\n\n{table}\n\n")
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(logger, "log_table"):
                logger.log_table(key="samples", columns=list(header), data=[list(row) for row in self._rows])
            elif hasattr(experiment, "add_text"):
                experiment.add_text("samples", table, trainer.global_step)

    def _cell(self, text: str) -> str:
        text = text if len(text) <= self.max_characters else text[: self.max_characters] + "…"
        return text.replace("|", "\\|").replace("\n", "<br>")
