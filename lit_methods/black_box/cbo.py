"""Supervised training without gradients, by consensus-based optimization (arXiv 2306.09778)."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric

from lit_methods.batches import SupervisedBatch
from lit_methods.lr_find import refuse_lr_finder
from lit_methods.optim import CBO, particle_losses
from lit_methods.optim.cbo.swarm import ParticleOptimizer
from lit_methods.optim.foundation.private_names import BatchNorm
from lit_methods.supervised import SupervisedModule

__all__ = ["CBOModule"]


class CBOModule(SupervisedModule):
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
        optimizer: builds a CBO, one of its kin, or a ConsensusHopping from the named trainable parameters.
        lr_scheduler: builds a learning rate scheduler from the optimizer; stepped once an epoch.
        chunk_size: particles evaluated at a time, to save memory; ``None`` for all.

    Raises:
        ValueError: ``num_classes`` is below 2, or ``chunk_size`` below 1.
        TypeError: in ``configure_optimizers``: ``optimizer`` builds another kind, or the scheduler needs a metric.

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
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, or None for all particles, got {chunk_size}")
        super().__init__(network, num_classes, loss, metrics, optimizer, lr_scheduler)
        self.automatic_optimization = False
        self.chunk_size = chunk_size

    def on_fit_start(self) -> None:
        """Refuse a callback that trains for another epoch to renew batch normalisation."""
        normalized = any(isinstance(module, BatchNorm) for module in self.network.modules())
        if normalized and any(isinstance(c, StochasticWeightAveraging) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "StochasticWeightAveraging renews batch normalisation in training steps, which a swarm cannot take: "
                "use WeightAveraging or EMAWeightAveraging"
            )

    def on_train_start(self) -> None:
        """Refuse Lightning's search for a learning rate."""
        refuse_lr_finder(self)

    @torch.no_grad()
    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> Tensor:
        """Move the swarm; the loss of the consensus point reached."""
        optimizer: Any = self.optimizers()
        if optimizer.particles_sharded:
            x, y = (tensor.flatten(0, 1) for tensor in self.all_gather(tuple(batch)))
        else:
            x, y = batch
        losses = particle_losses(self.network, self.loss, (x, y), self.chunk_size)
        optimizer.step(lambda: losses)
        loss = self.loss(self(x), y)
        self.log("train/loss", loss, batch_size=len(y))
        return loss

    def on_train_epoch_end(self) -> None:
        """Step the schedule."""
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The injected optimizer over the named trainable parameters, with the injected schedule if there is one."""
        optimizer = self.optimizer((name, p) for name, p in self.network.named_parameters() if p.requires_grad)
        if not isinstance(optimizer, ParticleOptimizer):
            raise TypeError(
                f"CBOModule needs a CBO or ConsensusHopping, got {type(optimizer).__name__}; optimizers that use "
                "gradients go with SupervisedModule"
            )
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError("CBOModule steps schedules once an epoch without a metric: choose one that needs none")
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
