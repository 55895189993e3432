"""Supervised training without gradients, by consensus-based optimization (arXiv 2306.09778)."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_methods.batches import SupervisedBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.optim import CBO, ConsensusHopping, particle_losses

__all__ = ["CBOModule"]


class CBOModule(LightningModule):
    """Classification or regression by particles: every step evaluates all networks of a swarm at once.

    After each step the wrapped ``network`` is the consensus point, which is what is validated, saved and used. It then
    runs once in training mode on the same batch, for ``train/loss`` and the running statistics of batch normalisation.
    The loss needs no gradient: 0-1 loss, quantised networks and calls out of torch will do (the last without ``vmap``:
    step the optimizer with a closure of your own).

    Logs ``train/loss`` per step, ``{val,test}/loss`` and ``{val,test}/<metric>`` per epoch. Optimizers with
    ``shard="data"`` see each rank's own batches; for ``shard="particles"`` the ranks' batches are joined.

    Args:
        network: maps ``x`` to logits ``(batch, num_classes)``, or to values shaped like ``y`` for regression.
        num_classes: number of classes (at least 2); ``None`` means regression.
        loss: maps (outputs, ``y``) to a scalar; default cross-entropy or mean squared error.
        metrics: name -> metric of (outputs, ``y``); default ``accuracy`` (micro) or ``mse``.
        optimizer: builds a CBO or ConsensusHopping from the named trainable parameters.
        lr_scheduler: builds a learning rate scheduler from the optimizer; stepped once an epoch.
        chunk_size: particles evaluated at a time, to save memory; ``None`` for all.

    Raises:
        ValueError: ``num_classes`` is below 2, or ``chunk_size`` below 1.
        TypeError: in ``configure_optimizers``: ``optimizer`` builds another kind.

    Example:
        >>> from lit_methods.nets import PostNormMLP
        >>> module = CBOModule(PostNormMLP(64, [10]), num_classes=10)
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int | None = None,
        loss: nn.Module | None = None,
        metrics: dict[str, Metric] | None = None,
        optimizer: OptimizerCallable = lambda params: CBO(params, alpha=5.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, or None for regression, got {num_classes}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, or None for all particles, got {chunk_size}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.automatic_optimization = False
        self.network = network
        self.num_classes = num_classes
        self.loss = loss or (nn.MSELoss() if num_classes is None else nn.CrossEntropyLoss())
        if metrics is None:
            classes = num_classes
            metrics = {"mse": MeanSquaredError()} if classes is None else {"accuracy": _accuracy(classes)}
        collection = MetricCollection(dict(metrics))
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.chunk_size = chunk_size

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the consensus network: logits ``(batch, num_classes)``, or regression values."""
        return self.network(x)

    @torch.no_grad()
    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Move the swarm."""
        optimizer: Any = self.optimizers()
        if optimizer.particles_sharded:
            x, y = (tensor.flatten(0, 1) for tensor in self.all_gather(tuple(batch)))
        else:
            x, y = batch
        losses = particle_losses(self.network, self.loss, (x, y), self.chunk_size)
        optimizer.step(lambda: losses)
        self.log("train/loss", self.loss(self.network(x), y), batch_size=len(y))

    def on_train_epoch_end(self) -> None:
        """Step the schedule."""
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def validation_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: SupervisedBatch, batch_idx: int) -> Tensor:
        """Class probabilities ``(batch, num_classes)``, or regression values."""
        outputs = self(batch[0])
        return outputs if self.num_classes is None else outputs.softmax(-1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The injected optimizer over the named trainable parameters, with the injected schedule if there is one."""
        optimizer = self.optimizer((name, p) for name, p in self.network.named_parameters() if p.requires_grad)
        if not isinstance(optimizer, CBO | ConsensusHopping):
            raise TypeError(
                f"CBOModule needs a CBO or ConsensusHopping, got {type(optimizer).__name__}; optimizers that use "
                "gradients go with SupervisedModule"
            )
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    def _evaluate(self, batch: SupervisedBatch, stage: str, metrics: MetricCollection) -> None:
        x, y = batch
        outputs = self(x)
        metrics.update(outputs, y)
        self.log(f"{stage}/loss", self.loss(outputs, y), sync_dist=True, batch_size=len(y))
        self.log_dict(metrics)


def _accuracy(num_classes: int) -> Metric:
    return MulticlassAccuracy(num_classes, average="micro")
