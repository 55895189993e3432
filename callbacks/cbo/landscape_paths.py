"""Where the runs on a two-dimensional landscape went, as a PNG file."""

from pathlib import PurePath
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from lit_methods.callbacks.figures import output_dir, save_figure


class LandscapePaths(Callback):
    """Draw the paths of all runs over the contours of the function, one panel per method.

    For modules with two-dimensional ``positions()`` and a ``forward`` from points to values, such as
    :class:`~lit_methods.black_box.LandscapeMinimization`. Thin lines are runs, the thick one is their mean, the cross
    is the minimiser 0. The picture is ``<log folder>/<name>.png``, and goes to every logger that takes figures. The
    paths are in the checkpoint.

    Args:
        low: lower end of both axes.
        high: upper end of both axes, > ``low``.
        every_n_steps: how often a position is taken, >= 1.
        name: the picture's file name without ending.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, low: float = -3.0, high: float = 9.0, every_n_steps: int = 1, name: str = "landscape_paths"
    ) -> None:
        if not low < high:
            raise ValueError(f"low must be less than high, got {low} and {high}")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if not name or PurePath(name).name != name:
            raise ValueError(f"name must be a plain file name without folders, got {name!r}")
        self.low, self.high, self.every_n_steps, self.name = low, high, every_n_steps, name
        self.paths: dict[str, list[Tensor]] = {}

    @property
    def state_key(self) -> str:
        """Tells several pictures of one Trainer apart."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """The paths so far."""
        return {"paths": {method: torch.stack(path) for method, path in self.paths.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.paths = {method: list(path) for method, path in state_dict["paths"].items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the starting points."""
        if not self.paths:
            self._take(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the positions."""
        if trainer.global_step % self.every_n_steps == 0:
            self._take(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        folder = output_dir(trainer)  # a collective call
        if not trainer.is_global_zero or not self.paths:
            return
        axis = torch.linspace(self.low, self.high, 200)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
        with torch.no_grad():
            values = pl_module(grid.to(pl_module.device)).cpu()
        figure = Figure(figsize=(4 * len(self.paths), 4), layout="constrained")
        row = figure.subplots(1, len(self.paths), squeeze=False)[0]
        for axes, (method, path) in zip(row, self.paths.items(), strict=True):
            runs = torch.stack(path)  # (steps, runs, 2)
            axes.contourf(axis, axis, values.log1p(), levels=30, cmap="Greys_r")
            axes.plot(runs[..., 0], runs[..., 1], color="tab:blue", alpha=0.25, linewidth=0.7)
            axes.plot(*runs.mean(1).T, color="tab:red", linewidth=2)
            axes.plot(0, 0, "x", color="gold", markersize=10, markeredgewidth=3)
            axes.set(title=method, xlim=(self.low, self.high), ylim=(self.low, self.high))
        save_figure(trainer, figure, self.name, folder)

    def _take(self, pl_module: LightningModule) -> None:
        positions: Any = getattr(pl_module, "positions", dict)
        for method, points in positions().items():
            self.paths.setdefault(method, []).append(points.cpu())
