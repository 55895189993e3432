"""How good a policy is, with its uncertainty."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lit_methods.batches import EpisodeBatch
from lit_methods.callbacks.figures import output_dir, save_figure
from lit_methods.optim.foundation.ranks import gather_objects


class PolicyEvaluation(Callback):
    """Statistics of the evaluation episodes that validation and test play, and a curve of them.

    Acts on modules whose validation and test batches are :class:`~lit_methods.batches.EpisodeBatch`, as those of
    :class:`lit_methods.datamodules.RolloutDataModule` are: deterministic actions, separate environments, fixed seeds,
    normalisers that evaluation does not touch. Beside the module's own ``val/return`` it logs ``val/return_iqm``
    (interquartile mean) and ``val/return_low`` and ``val/return_high``, the bootstrapped interval of the mean over
    episodes (of one trained policy; how seeds of training differ takes several runs); the same for ``test``. The curve
    against environment steps, with its interval, is ``policy_evaluation.png`` in the log folder.

    Args:
        confidence: of the interval, in (0, 1).
        num_resamples: bootstrap samples, >= 1; drawn from a seed of their own.
        x: logged metric on the curve's horizontal axis; the Trainer's steps if it is not logged.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, confidence: float = 0.95, num_resamples: int = 2000, x: str = "train/env_steps") -> None:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {confidence}")
        if num_resamples < 1:
            raise ValueError(f"num_resamples must be >= 1, got {num_resamples}")
        self.confidence = confidence
        self.num_resamples = num_resamples
        self.x = x
        self.points: list[tuple[float, float, float, float]] = []
        self._returns: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """The curve so far: horizontal place, mean, lower and upper end."""
        return {"points": list(self.points)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curve."""
        self.points = [tuple(point) for point in state_dict["points"]]

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Take the episodes' returns."""
        self._take(batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Take the episodes' returns."""
        self._take(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the statistics and add a point to the curve."""
        found = self._log(pl_module, "val")
        if found is not None and not trainer.sanity_checking:
            x = trainer.callback_metrics.get(self.x, torch.tensor(trainer.global_step))
            self.points.append((float(x), *found))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the statistics."""
        self._log(pl_module, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        folder = output_dir(trainer)
        if not trainer.is_global_zero or not self.points:
            return
        x, mean, low, high = np.array(self.points).T
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(x, mean, marker=".")
        axes.fill_between(x, low, high, alpha=0.3, label=f"{self.confidence:.0%} of the mean")
        axes.set(xlabel=self.x, ylabel="return of an episode")
        axes.legend()
        axes.grid(alpha=0.3)
        save_figure(trainer, figure, "policy_evaluation", folder)

    def _take(self, batch: Any) -> None:
        if isinstance(batch, EpisodeBatch):
            self._returns += batch.returns.tolist()

    def _log(self, pl_module: LightningModule, stage: str) -> tuple[float, float, float] | None:
        returns, self._returns = np.concatenate(gather_objects(self._returns)), []
        if not len(returns):
            return None
        low, high = bootstrap_interval(returns, self.confidence, self.num_resamples)
        found = {"iqm": interquartile_mean(returns), "low": low, "high": high}
        values = {f"{stage}/return_{name}": value for name, value in found.items()}
        pl_module.log_dict(values, sync_dist=False, rank_zero_only=False)
        return float(returns.mean()), low, high


def interquartile_mean(values: NDArray[Any]) -> float:
    """Mean without the lowest and the highest quarter (Agarwal et al. 2021, arXiv 2108.13264)."""
    cut = len(values) // 4
    return float(np.sort(values)[cut : len(values) - cut].mean())


def bootstrap_interval(values: NDArray[Any], confidence: float, num_resamples: int) -> tuple[float, float]:
    """Percentile interval of the mean; its draws are the same in every call."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (num_resamples, len(values))).mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
