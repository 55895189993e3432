"""Convergence rates of logged errors, fitted and drawn."""

import math

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure

from lit_methods.callbacks.figures import output_dir, save_figure
from lit_methods.callbacks.learning_curves import LearningCurves


class ConvergenceRates(LearningCurves):
    """Fit how fast logged errors fall: as a power of the step, and exponentially; draw both, print one table.

    Points are taken as :class:`LearningCurves` takes them. For each metric two straight lines are fitted by least
    squares to the points with step >= ``from_step`` and value >= ``floor``: log error over log step (``slope``; -2 is
    an error of ``1/T^2``) and log error over step (``rate``; the error shrinks by ``exp(rate)`` a step). The better fit
    (larger R^2) names the law. The table is printed on rank zero when ``fit`` ends, kept in ``rates``, and drawn to
    ``<log folder>/<name>.png``.

    Args:
        metrics: names of logged metrics, with values > 0.
        from_step: first optimizer step of the fit, >= 1.
        floor: values below are rounding noise and left out of the fit, > 0.
        name: the picture's file name without ending.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, metrics: list[str], from_step: int = 1, floor: float = 1e-22, name: str = "convergence_rates"
    ) -> None:
        super().__init__(metrics, name)
        if from_step < 1:
            raise ValueError(f"from_step must be at least 1, got {from_step}")
        if not 0 < floor < float("inf"):
            raise ValueError(f"floor must be > 0 and finite, got {floor}")
        self.from_step = from_step
        self.floor = floor
        self.rates: dict[str, dict[str, float]] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit, print and draw."""
        self.rates = {metric: fit for metric in self.points if (fit := self._fit(metric))}
        super().on_fit_end(trainer, pl_module)
        if trainer.is_global_zero and self.rates:
            width = max(map(len, self.rates))
            title = f"{'':<{width}}  {'slope':>8} {'R^2':>7}  {'rate per step':>13} {'R^2':>7}  {'last error':>10}"
            rows = [
                f"{metric:<{width}}  {fit['slope']:8.3f} {fit['slope_r2']:7.4f}  "
                f"{fit['rate']:13.6f} {fit['rate_r2']:7.4f}  {fit['last']:10.2e}"
                for metric, fit in self.rates.items()
            ]
            print("\n".join(["", title, *rows]))

    def _fit(self, metric: str) -> dict[str, float]:
        points = [(step, e) for step, e in self.points[metric] if step >= self.from_step and e >= self.floor]
        if len(points) < 3:
            return {}
        steps, errors = np.array(points, dtype=np.float64).T
        slope, slope_r2 = _line(np.log(steps), np.log(errors))
        rate, rate_r2 = _line(steps, np.log(errors))
        last = self.points[metric][-1][1]
        return {"slope": slope, "slope_r2": slope_r2, "rate": rate, "rate_r2": rate_r2, "last": last}

    def _draw(self, trainer: Trainer) -> None:
        folder = output_dir(trainer)
        if not trainer.is_global_zero or not self.points:
            return
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, xscale in zip(figure.subplots(1, 2), ("log", "linear"), strict=True):
            for metric, points in self.points.items():
                fit = self.rates.get(metric, {})
                key, text = ("slope", "slope {:.2f}") if xscale == "log" else ("rate", "rate {:.4f}")
                label = f"{metric}: {text.format(fit[key])}" if fit else metric
                axes.plot(*np.array([p for p in points if p[0] > 0 and p[1] > 0]).reshape(-1, 2).T, label=label)
            axes.set(xscale=xscale, yscale="log", xlabel="optimizer step", ylabel="error")
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
        save_figure(trainer, figure, self.name, folder)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and R^2 of the least-squares line."""
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    misfit = float(((y - slope * x - intercept) ** 2).sum())
    return float(slope), 1 - misfit / spread if spread > 0 else math.nan
