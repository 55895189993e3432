"""Metrics of generated samples in validation and test."""

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lit_methods.diffusion.streams import stream

Stage = Literal["val", "test"]


class SampleQuality(Callback):
    """Make a sample for every row of the validation or test data, and log how the two compare.

    The module has a method ``sample(n, cond, generator=..., shape=...)``, as
    :class:`~lit_methods.diffusion.Diffusion` and :class:`~lit_methods.diffusion.FlowMap` have. Noise is the same in
    every validation. Logs ``{val,test}/<metric>``, or ``{val,test}/<variant>/<metric>`` where there are variants.

    Args:
        metrics: name -> metric updated with ``(samples, real=...)``, such as those of ``lit_methods.metrics`` and
            torchmetrics' ``FrechetInceptionDistance``; real samples are those of the validation or test data.
        train_metrics: likewise, with the training data as real samples (``trainer.datamodule.train_data``, which our
            datamodules have); those that take labels ``y`` get them.
        variants: name -> arguments of ``sample``, such as ``{"euler_10": {"solver": "euler", "steps": 10}}``.
        conditional: whether samples are told the ``y`` of their row; ``None``: if the module is conditional.
        every_n_epochs: validations between two evaluations, >= 1; tests are always evaluated.
        seed: of the noise, >= 0.

    Raises:
        ValueError: an argument out of range, no metric, or a datamodule without training data.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric] | None = None,
        train_metrics: Mapping[str, Metric] | None = None,
        variants: Mapping[str, dict[str, Any]] | None = None,
        conditional: bool | None = None,
        every_n_epochs: int = 1,
        seed: int = 0,
    ) -> None:
        if not metrics and not train_metrics:
            raise ValueError("metrics or train_metrics must name at least one metric, got none")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be >= 1, got {every_n_epochs}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self.metrics = dict(metrics or {})
        self.train_metrics = dict(train_metrics or {})
        self.variants = dict(variants or {"": {}})
        self.conditional = conditional
        self.every_n_epochs = every_n_epochs
        self.seed = seed
        self._clones: dict[str, dict[str, Metric]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with empty metrics."""
        if not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._begin(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with empty metrics."""
        self._begin(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Add a batch."""
        self._add(trainer, pl_module, "val", *args)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Add a batch."""
        self._add(trainer, pl_module, "test", *args)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._log(pl_module, "test")

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        both = self.metrics | self.train_metrics
        self._clones = {
            variant: {name: metric.clone().to(pl_module.device) for name, metric in both.items()}
            for variant in self.variants
        }
        if not self.train_metrics:
            return
        rows = getattr(getattr(trainer, "datamodule", None), "train_data", None)
        if rows is None:
            raise ValueError("train_metrics need a datamodule whose train_data are there, as ours have, got none")
        transform = getattr(trainer.datamodule, "transform", None)  # type: ignore[attr-defined]
        x, y = (part.to(pl_module.device) for part in (rows if transform is None else transform(rows))[:2])
        for metrics in self._clones.values():
            for name in self.train_metrics:
                metrics[name].update(x, real=True, **metrics[name]._filter_kwargs(y=y))

    def _add(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: Stage,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        x = batch[0]
        for variant, metrics in self._clones.items():
            place = (self.seed, trainer.global_rank, stage, dataloader_idx, batch_idx)
            samples = pl_module.sample(  # type: ignore[operator]
                len(x),
                batch[1] if self._told(pl_module) else None,
                generator=stream(pl_module.device, *place),
                shape=x.shape[1:],
                **self.variants[variant],
            )
            for name, metric in metrics.items():
                metric.update(samples, real=False)
                if name in self.metrics:
                    metric.update(x, real=True, **metric._filter_kwargs(y=batch[1]))

    def _told(self, pl_module: LightningModule) -> bool:
        if self.conditional is not None:
            return self.conditional
        return getattr(pl_module.denoiser, "conditioning", None) is not None

    def _log(self, pl_module: LightningModule, stage: Stage) -> None:
        for variant, metrics in self._clones.items():
            prefix = "/".join(part for part in (stage, variant) if part)
            for name, metric in metrics.items():
                for key, value in _named_values(name, metric.compute()).items():
                    pl_module.log(f"{prefix}/{key}", value)
        self._clones = {}


def _named_values(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, dict):
        return dict(value)
    return {name: value[0] if isinstance(value, tuple) else value}  # KernelInceptionDistance: mean and spread
