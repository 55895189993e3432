"""Where callbacks put their figures."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure


def output_dir(trainer: Trainer) -> Path:
    """The run's folder on every rank (a collective call): ``trainer.log_dir``, or the default root without a logger."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def save_figure(trainer: Trainer, figure: Figure, name: str, folder: Path) -> None:
    """Write ``<folder>/<name>.png`` and hand the figure to every logger that takes figures. Call on rank zero only."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
    for logger in trainer.loggers:
        _log_figure(logger, figure, name, trainer.global_step)


def _log_figure(logger: Logger, figure: Figure, name: str, step: int) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key=name, images=[figure], step=step)
    elif hasattr(experiment, "add_figure"):  # TensorBoard
        experiment.add_figure(name, figure, global_step=step, close=False)
    elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_figure(logger.run_id, figure, f"{name}.png")
    elif hasattr(experiment, "log_figure"):  # Comet
        experiment.log_figure(figure_name=name, figure=figure, step=step)
