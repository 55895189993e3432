"""Where a recurrent model of time series puts chance: free runs beside the data."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from lit_methods.batches import TimeSeriesBatch
from lit_methods.callbacks.figures import output_dir, save_figure
from lit_methods.vi import PVRNN


class PriorRollouts(Callback):
    """Let a :class:`~lit_methods.vi.PVRNN` run free, and compare it with the training series.

    Every few epochs logs:

    - ``prior/sigma/<phase>``: the prior's mean standard deviation at each phase of the period, after ``burn_in`` steps;
    - ``prior/above/<phase>``: share of runs whose first number is above the data's mid-range there, and
      ``data/above/<phase>``, that of the training series;
    - ``prior/memorised``: share of runs that lie on the same side as one and the same training series at every step.

    When fit ends it draws ``prior_rollouts.png``: runs and series, the prior's standard deviation, and the shares above
    by step. Its noise is its own and the same every time.

    Args:
        num_rollouts: runs, >= 1.
        period: of the series, in steps, >= 1; 1 if it has none.
        burn_in: first steps that do not count, >= 0.
        every_n_epochs: >= 1.

    Raises:
        ValueError: an argument out of range; when training begins: the module has no ``network`` that is a PVRNN.
    """

    def __init__(self, num_rollouts: int = 500, period: int = 1, burn_in: int = 3, every_n_epochs: int = 100) -> None:
        for name, value, least in (
            ("num_rollouts", num_rollouts, 1),
            ("period", period, 1),
            ("burn_in", burn_in, 0),
            ("every_n_epochs", every_n_epochs, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self.num_rollouts, self.period, self.burn_in = num_rollouts, period, burn_in
        self.every_n_epochs = every_n_epochs
        self.history: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far."""
        return {"history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint."""
        self.history = list(state_dict["history"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that cannot run free."""
        if not isinstance(getattr(pl_module, "network", None), PVRNN):
            raise ValueError(f"PriorRollouts needs a module with a PVRNN as network, got {type(pl_module).__name__}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        values, mask = self._data(trainer)
        runs, scales = self._runs(pl_module, values)
        middle = _middle(values, mask)
        above, run_above = values[..., 0] > middle, runs[..., 0] > middle
        same = ((run_above[:, None] == above) | ~mask).all(2).any(1)
        found = {"prior/memorised": same.double().mean().item()}
        steps = torch.arange(values.shape[1])
        for phase in range(self.period):
            chosen = (steps % self.period == phase) & (steps >= self.burn_in)
            if chosen.any():
                found[f"prior/sigma/{phase}"] = scales[:, chosen].double().mean().item()
                found[f"prior/above/{phase}"] = run_above[:, chosen].double().mean().item()
                found[f"data/above/{phase}"] = above[:, chosen][mask[:, chosen]].double().mean().item()
        self.history.append({"step": trainer.global_step, **found})
        pl_module.log_dict(found, rank_zero_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figure."""
        folder = output_dir(trainer)
        if not trainer.is_global_zero:
            return
        values, mask = self._data(trainer)
        runs, scales = self._runs(pl_module, values)
        save_figure(trainer, _figure(values, mask, runs, scales), "prior_rollouts", folder)

    def _data(self, trainer: Trainer) -> tuple[Tensor, Tensor]:
        data = getattr(trainer.datamodule, "train_data", None)  # type: ignore[attr-defined]
        if not isinstance(data, TimeSeriesBatch):
            raise ValueError("PriorRollouts needs a datamodule whose train_data is a TimeSeriesBatch")
        return data.values, data.mask

    def _runs(self, module: LightningModule, values: Tensor) -> tuple[Tensor, Tensor]:
        network: Any = module.network
        generator = torch.Generator(module.device).manual_seed(0)
        run = network.generate(values.shape[1], self.num_rollouts, generator=generator)
        return run.mean.cpu(), run.prior_scale.cpu()


def _middle(values: Tensor, mask: Tensor) -> float:
    first = values[..., 0][mask]
    return float(first.min() + first.max()) / 2


def _figure(values: Tensor, mask: Tensor, runs: Tensor, scales: Tensor) -> Figure:
    figure = Figure(figsize=(9, 7), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    steps = range(1, values.shape[1] + 1)
    top.plot(steps, runs[:30, :, 0].T, color="tab:blue", alpha=0.25, linewidth=0.8)
    top.plot(steps, torch.where(mask, values[..., 0], torch.nan)[:10].T, color="black", alpha=0.4, linewidth=0.8)
    top.set_ylabel("first number")
    top.set_title("free runs of the prior (blue) and training series (black)", fontsize=10)
    for unit in range(scales.shape[2]):
        middle.plot(steps, scales[..., unit].mean(0), marker=".", label=f"latent {unit + 1}")
    middle.set_ylabel("prior sigma")
    middle.legend(fontsize=8)
    cut = _middle(values, mask)
    counts = mask.sum(0).clamp(min=1)
    bottom.plot(steps, (runs[..., 0] > cut).double().mean(0), color="tab:blue", marker=".", label="free runs")
    bottom.plot(steps, ((values[..., 0] > cut) & mask).sum(0) / counts, color="black", marker="x", label="series")
    bottom.set_ylabel(f"share above {cut:.2g}")
    bottom.set_xlabel("step")
    bottom.set_ylim(-0.05, 1.05)
    bottom.legend(fontsize=8)
    return figure
