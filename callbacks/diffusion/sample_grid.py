"""Pictures of generated samples while a model trains."""

from pathlib import PurePath
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lit_methods.callbacks.figures import output_dir, save_figure
from lit_methods.diffusion.streams import stream


class SampleGrid(Callback):
    """Draw samples, and how some of them came about, at validation: ``<log folder>/<name>.png`` and to loggers.

    The module has a method ``sample(n, cond, generator=..., on_step=...)``, as
    :class:`~lit_methods.diffusion.Diffusion` and :class:`~lit_methods.diffusion.FlowMap` have. Samples ``(channels,
    height, width)`` are drawn as images, samples of two numbers as points. The noise is the same every time, so that
    pictures of different epochs can be compared.

    Args:
        num_samples: samples to draw, >= 1.
        num_classes: draw samples told of the classes 0, 1, ... in turn; ``None``: told of nothing.
        trajectory: number of times at which the first samples are also shown while they are made, >= 0.
        every_n_epochs: validations between two pictures, >= 1.
        value_range: what is drawn black and white; ``None``: the smallest and the largest value.
        name: file name without ending.
        seed: of the noise, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_samples: int = 64,
        num_classes: int | None = None,
        trajectory: int = 0,
        every_n_epochs: int = 1,
        value_range: tuple[float, float] | None = None,
        name: str = "samples",
        seed: int = 0,
    ) -> None:
        for argument, value, low in (
            ("num_samples", num_samples, 1),
            ("num_classes", num_classes or 1, 1),
            ("trajectory", trajectory, 0),
            ("every_n_epochs", every_n_epochs, 1),
            ("seed", seed, 0),
        ):
            if value < low:
                raise ValueError(f"{argument} must be >= {low}, got {value}")
        if not name or PurePath(name).name != name:
            raise ValueError(f"name must be a plain file name without folders, got {name!r}")
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.trajectory = trajectory
        self.every_n_epochs = every_n_epochs
        self.value_range = value_range
        self.name = name
        self.seed = seed

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, on rank zero."""
        if trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        folder = output_dir(trainer)
        if not trainer.is_global_zero:
            return
        cond = None
        if self.num_classes is not None:
            cond = torch.arange(self.num_samples, device=pl_module.device) % self.num_classes
        steps: list[Tensor] = []
        options: dict[str, Any] = {"on_step": lambda t, x, x0: steps.append(x.cpu())} if self.trajectory else {}
        generator = stream(pl_module.device, self.seed, "grid")
        samples = pl_module.sample(self.num_samples, cond, generator=generator, **options)  # type: ignore[operator]
        samples = samples.float().cpu()
        figure = Figure(figsize=(5, 5), layout="constrained")
        draw_samples(figure.subplots(), samples, self.value_range)
        save_figure(trainer, figure, self.name, folder)
        if self.trajectory:
            chosen = torch.linspace(0, len(steps), self.trajectory).round().long().tolist()
            path = [[*steps, samples][i] for i in chosen]
            figure = Figure(figsize=(1.5 * len(path), 3), layout="constrained")
            row = figure.subplots(1, len(path), squeeze=False)[0]
            for axes, x in zip(row, path, strict=True):
                draw_samples(axes, x.float() if x[0].numel() == 2 else x[:8].float(), self.value_range, columns=2)
            save_figure(trainer, figure, f"{self.name}_trajectory", folder)


def draw_samples(
    axes: Axes, samples: Tensor, value_range: tuple[float, float] | None = None, columns: int | None = None
) -> None:
    """Draw images ``(n, channels, height, width)`` in a grid, or points ``(n, 2)``.

    Args:
        axes: where.
        samples: on the CPU, float32.
        value_range: what is drawn black and white; ``None``: the smallest and the largest value.
        columns: images in a row; ``None``: a square.

    Raises:
        ValueError: samples of another shape.
    """
    if samples.ndim == 2 and samples.shape[1] == 2:
        axes.scatter(samples[:, 0], samples[:, 1], s=2)
        axes.set_aspect("equal")
        return
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise ValueError(
            f"samples must be images (n, 1 or 3, height, width) or points (n, 2), got {tuple(samples.shape)}"
        )
    low, high = value_range or (float(samples.min()), float(samples.max()))
    columns = columns or max(1, int(len(samples) ** 0.5))
    rows = -(-len(samples) // columns)
    images = ((samples - low) / max(high - low, 1e-12)).clamp(0, 1)
    padded = torch.nn.functional.pad(images, (0, 1, 0, 1), value=0.5)
    padded = torch.cat([padded, padded.new_full((rows * columns - len(padded), *padded.shape[1:]), 0.5)])
    grid = padded.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    axes.imshow(grid.squeeze(-1), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
