"""Curves of logged metrics as PNG files."""

from pathlib import PurePath
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure

from lit_methods.callbacks.figures import output_dir, save_figure


class LearningCurves(Callback):
    """Draw chosen logged metrics against the Trainer's steps, three panels a row, one per name without its stage.

    ``train/loss`` and ``val/loss`` share the panel ``loss``, and ``train/kl/1`` and ``train/kl/2`` the panel ``kl``.
    What never changed is left out. A point is taken after every validation run (names that start with ``val``) and at
    the end of every training epoch (all others). The picture is written to ``<log folder>/<name>.png`` when ``fit``
    ends, also after an exception, and goes to every logger that takes figures. The points are part of the checkpoint,
    so a resumed run draws the whole curve.

    Args:
        metrics: names of logged metrics to draw; ``None`` draws all.
        name: the picture's file name without ending.
        x: logged metric to draw against instead, such as ``train/env_steps``.

    Raises:
        ValueError: ``metrics`` is empty, or ``name`` is not a plain file name.
    """

    def __init__(self, metrics: list[str] | None = None, name: str = "learning_curves", x: str | None = None) -> None:
        if metrics is not None and not metrics:
            raise ValueError("metrics must name at least one logged metric, or be None for all, got []")
        if not name or PurePath(name).name != name:
            raise ValueError(f"name must be a plain file name without folders, got {name!r}")
        self.metrics = metrics
        self.name = name
        self.x = x
        self.points: dict[str, list[tuple[float, float]]] = {}

    @property
    def state_key(self) -> str:
        """Tells several curves of one Trainer apart."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """The points taken so far."""
        return {"points": {metric: list(points) for metric, points in self.points.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue curves from a checkpoint."""
        self.points = {metric: [tuple(p) for p in points] for metric, points in state_dict["points"].items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take one point of every chosen metric whose name starts with ``val``."""
        if not trainer.sanity_checking:
            self._take_points(trainer, validation=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take one point of every other chosen metric."""
        self._take_points(trainer, validation=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is."""
        if trainer.world_size == 1:  # the other ranks may be gone, and finding the log folder is a collective call
            self._draw(trainer)

    def _take_points(self, trainer: Trainer, validation: bool) -> None:
        if self.x is not None and self.x not in trainer.callback_metrics:
            return
        x = trainer.global_step if self.x is None else float(trainer.callback_metrics[self.x])
        for metric, value in trainer.callback_metrics.items():
            if (
                metric != self.x
                and metric.startswith("val") == validation
                and (self.metrics is None or metric in self.metrics)
            ):
                self.points.setdefault(metric, []).append((x, float(value)))

    def _draw(self, trainer: Trainer) -> None:
        folder = output_dir(trainer)
        if not trainer.is_global_zero or not self.points:
            return
        changing = [metric for metric, points in self.points.items() if len({y for _, y in points}) > 1]
        panels: dict[str, list[str]] = {}
        for metric in changing or self.points:
            panels.setdefault(_title(metric), []).append(metric)
        columns, rows = min(3, len(panels)), -(-len(panels) // 3)
        figure = Figure(figsize=(4.5 * columns, 3.5 * rows), layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (title, metrics) in zip(grid, panels.items(), strict=False):
            for metric in metrics:
                axes.plot(*torch.tensor(self.points[metric], dtype=torch.float64).T, marker=".", label=metric)
            axes.set(xlabel=self.x or "optimizer step", title=title)
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
        for axes in grid[len(panels) :]:
            axes.remove()
        save_figure(trainer, figure, self.name, folder)


def _title(metric: str) -> str:
    """The metric without its stage, and without a number at its end."""
    name = metric.partition("/")[2] or metric
    head, _, tail = name.rpartition("/")
    return head if head and tail.isdigit() else name
