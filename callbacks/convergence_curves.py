"""How fast logged quantities go to zero, as a PNG file."""

from pathlib import PurePath
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure

from lit_methods.callbacks.figures import output_dir, save_figure


class ConvergenceCurves(Callback):
    """Draw logged training metrics against batches on a logarithmic scale, one panel per group of names.

    ``train/kl/nash_mp`` and ``train/kl/bound`` share the panel ``kl``. The picture is written to
    ``<log folder>/<name>.png`` when ``fit`` ends and goes to every logger that takes figures. The points are in the
    checkpoint.

    Args:
        groups: panels, such as ``kl`` for all metrics ``train/kl/...``.
        name: the picture's file name without ending.
        xlabel: what a batch is.

    Raises:
        ValueError: ``groups`` is empty, or ``name`` is not a plain file name.
    """

    def __init__(self, groups: list[str], name: str = "convergence", xlabel: str = "batch") -> None:
        if not groups:
            raise ValueError("groups must name at least one group of metrics, got []")
        if not name or PurePath(name).name != name:
            raise ValueError(f"name must be a plain file name without folders, got {name!r}")
        self.groups = groups
        self.name = name
        self.xlabel = xlabel
        self.points: dict[str, list[float]] = {}

    @property
    def state_key(self) -> str:
        """Tells several pictures of one Trainer apart."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """The points taken so far."""
        return {"points": {metric: list(values) for metric, values in self.points.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue curves from a checkpoint."""
        self.points = {metric: list(values) for metric, values in state_dict["points"].items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take one point of every metric of the groups."""
        for metric, value in trainer.callback_metrics.items():
            if metric.startswith(tuple(f"train/{group}/" for group in self.groups)):
                self.points.setdefault(metric, []).append(float(value))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        folder = output_dir(trainer)  # a collective call
        if not trainer.is_global_zero or not self.points:
            return
        figure = Figure(figsize=(5.5 * len(self.groups), 4), layout="constrained")
        row = figure.subplots(1, len(self.groups), squeeze=False)[0]
        for axes, group in zip(row, self.groups, strict=True):
            for metric, values in sorted(self.points.items()):
                if metric.startswith(f"train/{group}/"):
                    style = "k--" if metric.endswith("/bound") else "-"
                    batches = torch.arange(1, len(values) + 1)
                    axes.plot(batches, values, style, label=metric.removeprefix(f"train/{group}/"))
            axes.set(xlabel=self.xlabel, title=group, yscale="log")
            axes.legend()
            axes.grid(alpha=0.3)
        save_figure(trainer, figure, self.name, folder)
