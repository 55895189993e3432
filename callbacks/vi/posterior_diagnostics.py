"""Whether an approximate posterior can be trusted, and what its model would have observed."""

import math
from pathlib import PurePath
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from lit_methods.callbacks.figures import output_dir, save_figure


class PosteriorDiagnostics(Callback):
    """Importance weights and posterior predictive draws of a :class:`~lit_methods.vi.ProgrammableVI`, at validation.

    For the first ``num_batches`` validation batches, on each rank, draws ``num_particles`` of the guide for every
    problem and logs means over problems:

    - ``vi/elbo``: the mean log-weight;
    - ``vi/log_evidence``: the log of the mean weight, the importance-weighted bound;
    - ``vi/ess``: effective sample size of the weights, as a share of ``num_particles``;
    - ``vi/k_hat``: Pareto shape of the largest weights, and ``vi/k_hat_bad``, the share of problems above 0.7, for
      which the guide should not be trusted. Problems whose largest weights are equal (an exact guide) count as 0.

    And draws ``<log folder>/<name>.png``: each observed site of the first batch beside what the model draws in its
    place: images where an observation has ``image_shape``, else quantiles against the data. The values are also in
    ``history``.

    Args:
        num_particles: draws for each problem, >= 25.
        num_batches: validation batches, >= 1.
        num_predictive: posterior predictive draws of the figure, >= 1.
        image_shape: ``[height, width]`` of observations to be drawn as images.
        every_n_epochs: validations between two measurements, >= 1.
        name: file name without ending.

    Attributes:
        history: one dict per measurement: ``step`` and the values.

    Raises:
        ValueError: an argument out of range.
        TypeError: in ``fit``: the module is not a ``ProgrammableVI``.
    """

    def __init__(
        self,
        num_particles: int = 200,
        num_batches: int = 1,
        num_predictive: int = 50,
        image_shape: tuple[int, int] | None = None,
        every_n_epochs: int = 1,
        name: str = "posterior_predictive",
    ) -> None:
        for argument, value, low in (
            ("num_particles", num_particles, 25),
            ("num_batches", num_batches, 1),
            ("num_predictive", num_predictive, 1),
            ("every_n_epochs", every_n_epochs, 1),
        ):
            if value < low:
                raise ValueError(f"{argument} must be >= {low}, got {value}")
        if image_shape is not None and (len(image_shape) != 2 or min(image_shape) < 1):
            raise ValueError(f"image_shape must be two sizes >= 1, got {image_shape}")
        if not name or PurePath(name).name != name:
            raise ValueError(f"name must be a plain file name without folders, got {name!r}")
        self.num_particles = num_particles
        self.num_batches = num_batches
        self.num_predictive = num_predictive
        self.image_shape = None if image_shape is None else (image_shape[0], image_shape[1])
        self.every_n_epochs = every_n_epochs
        self.name = name
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._first: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far."""
        return {"history": [dict(line) for line in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint."""
        self.history = [dict(line) for line in state_dict["history"]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other modules."""
        from lit_methods.vi import ProgrammableVI

        if not isinstance(pl_module, ProgrammableVI):
            raise TypeError(f"the module must be a ProgrammableVI, got {type(pl_module).__name__}")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a measurement."""
        self._sums, self._first = {}, None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Weigh draws of the guide."""
        from lit_methods.vi.programmable import effective_sample_size, pareto_k_hat

        if self._rests(trainer) or batch_idx >= self.num_batches or dataloader_idx:
            return
        log_w = pl_module.log_weights(batch, self.num_particles)
        k_hat = pareto_k_hat(log_w).nan_to_num(neginf=0.0)
        found = {
            "elbo": log_w.mean(0),
            "log_evidence": log_w.logsumexp(0) - torch.tensor(float(self.num_particles)).log(),
            "ess": effective_sample_size(log_w) / self.num_particles,
            "k_hat": k_hat,
            "k_hat_bad": (k_hat > 0.7).to(log_w.dtype),
        }
        for name, value in found.items():
            self._sums.setdefault(name, []).append(value.flatten())
        if self._first is None:
            self._first = batch

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log, and draw on rank zero."""
        if self._rests(trainer) or not self._sums:
            return
        values = {name: torch.cat(parts).mean() for name, parts in self._sums.items()}
        pl_module.log_dict({f"vi/{name}": value for name, value in values.items()}, sync_dist=True)
        self.history.append({"step": trainer.global_step, **{name: float(value) for name, value in values.items()}})
        prediction = pl_module.posterior_predictive(self._first, self.num_predictive)
        folder = output_dir(trainer)
        if not trainer.is_global_zero or not prediction.drawn:
            return
        figure = Figure(figsize=(5 * len(prediction.drawn), 4), layout="constrained")
        row = figure.subplots(1, len(prediction.drawn), squeeze=False)[0]
        for axes, (site, drawn) in zip(row, prediction.drawn.items(), strict=True):
            axes.set_title(site)
            self._draw(axes, drawn.float().cpu(), prediction.observed[site].float().cpu())
        save_figure(trainer, figure, self.name, folder)

    def _rests(self, trainer: Trainer) -> bool:
        return bool(trainer.sanity_checking) or (trainer.current_epoch + 1) % self.every_n_epochs != 0

    def _draw(self, axes: Any, drawn: Tensor, observed: Tensor) -> None:
        if self.num_predictive == 1:
            drawn = drawn[None]
        if self.image_shape is not None and drawn.ndim > 2 and drawn[0, 0].numel() == math.prod(self.image_shape):
            rows = [images[:8].reshape(-1, *self.image_shape) for images in (observed, *drawn[:4])]
            axes.imshow(torch.cat([torch.cat(list(row), 1) for row in rows]), cmap="gray")
            axes.set(xticks=[], yticks=[], ylabel="drawn (4 rows), observed (top)")
            return
        observed = observed.expand(drawn.shape[1:]).flatten()
        low, middle, high = drawn.flatten(1).quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
        axes.errorbar(observed, middle, torch.stack([middle - low, high - middle]), fmt=".", alpha=0.5)
        axes.axline((0, 0), slope=1, color="k", lw=0.5)
        axes.set(xlabel="observed", ylabel="drawn: median, 5 % to 95 %")
