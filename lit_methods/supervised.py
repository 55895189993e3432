"""Plain supervised learning: the LightningModule that the optimizer recipes share, and SSO's by target closures."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_methods.batches import SupervisedBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.lr_find import refuse_lr_finder
from lit_methods.optim import SSO
from lit_methods.precision import load_unrounded

__all__ = ["SSOModule", "SupervisedModule"]


class SupervisedModule(LightningModule):
    """Classification or regression of ``(x, y)`` batches with any network and any optimizer.

    Logs ``train/loss`` per step and ``{val,test}/loss`` and ``{val,test}/<metric>`` per epoch.

    Args:
        network: maps ``x`` to logits ``(batch, num_classes)``, or to values shaped like ``y`` for regression.
        num_classes: number of classes (at least 2); ``None`` means regression.
        loss: maps (outputs, ``y``) to a scalar; default cross-entropy for classification, mean squared error for
            regression.
        metrics: name -> metric of (outputs, ``y``); default ``accuracy`` (micro) or ``mse``.
        optimizer: builds the optimizer from the trainable parameters.
        lr_scheduler: builds a learning rate scheduler from the optimizer; stepped once an epoch.

    Raises:
        ValueError: ``num_classes`` is below 2.

    Example:
        >>> from lit_methods.nets import MLP
        >>> from lit_methods.optim import MFAC
        >>> module = SupervisedModule(MLP(64, [32], 10), num_classes=10, optimizer=lambda params: MFAC(params, lr=0.01))
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int | None = None,
        loss: nn.Module | None = None,
        metrics: dict[str, Metric] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, or None for regression, got {num_classes}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.network = network
        self.num_classes = num_classes
        self.loss = loss or (nn.MSELoss() if num_classes is None else nn.CrossEntropyLoss())
        if metrics is None:
            metrics = {"mse": MeanSquaredError()} if num_classes is None else {"accuracy": _accuracy(num_classes)}
        collection = MetricCollection(dict(metrics))
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)``, or regression values."""
        return self.network(x)

    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> Tensor:
        """Mean loss of one batch."""
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train/loss", loss)
        return loss

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
        """The injected optimizer over the trainable parameters, with the injected schedule if there is one."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _evaluate(self, batch: SupervisedBatch, stage: str, metrics: MetricCollection) -> None:
        x, y = batch
        outputs = self(x)
        metrics.update(outputs, y)
        self.log(f"{stage}/loss", self.loss(outputs, y), sync_dist=True, batch_size=len(y))
        self.log_dict(metrics)


class SSOModule(SupervisedModule):
    """Supervised learning with :class:`~lit_methods.optim.SSO` by target closures (manual optimization).

    The network's outputs are the targets, ``loss`` is evaluated on them once for each step (``rule="armijo"``: once
    more for each trial). To put SSO under a module that has an ordinary ``training_step``, use
    :class:`~lit_methods.callbacks.TargetCapture` instead. Logs the same as :class:`SupervisedModule`.

    Args:
        network: maps ``x`` to logits ``(batch, num_classes)``, or to values shaped like ``y`` for regression. Running
            statistics (batch normalisation) move once in each step.
        num_classes: number of classes (at least 2); ``None`` means regression.
        loss: maps (outputs, ``y``) to a scalar; default cross-entropy for classification, mean squared error for
            regression. A mean over examples, unless ``optimizer`` is told of another reduction.
        metrics: name -> metric of (outputs, ``y``); default ``accuracy`` (micro) or ``mse``.
        optimizer: builds the SSO; default: 1/L of the cross-entropy and ten inner steps.
        lr_scheduler: builds a scheduler of η, stepped once an epoch.

    Raises:
        ValueError: ``num_classes`` is below 2.
        TypeError: in ``configure_optimizers``: ``optimizer`` does not build an SSO, or the scheduler needs a metric.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int | None = None,
        loss: nn.Module | None = None,
        metrics: dict[str, Metric] | None = None,
        optimizer: OptimizerCallable = lambda params: SSO(params, lr=None, loss="ce"),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(network, num_classes, loss, metrics, optimizer, lr_scheduler)
        self.automatic_optimization = False

    def on_train_start(self) -> None:
        """Refuse Lightning's search for a learning rate."""
        refuse_lr_finder(self)

    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> Tensor:
        """Take one step; the loss before it."""
        x, y = batch
        optimizer: Any = self.optimizers()
        loss = optimizer.step(lambda: (self(x), lambda outputs: self.loss(outputs, y)))
        self.log("train/loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        """Step the schedule."""
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The injected SSO, told of the network so that its running statistics move once in each step."""
        configured: Any = super().configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        if not isinstance(optimizer, SSO):
            raise TypeError(
                f"SSOModule needs an optimizer that is an SSO, got {type(optimizer).__name__}; others go with "
                "SupervisedModule"
            )
        if isinstance(configured, dict) and isinstance(configured["lr_scheduler"], dict):
            raise TypeError("SSOModule steps schedules once an epoch without a metric: choose one that needs none")
        optimizer.capture(self.network)
        return configured


def _accuracy(num_classes: int) -> Metric:
    return MulticlassAccuracy(num_classes, average="micro")
