"""Rigid registration of point sets without correspondences, by gradient descent on an optimal transport loss."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_methods.batches import PointSetBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.precision import load_unrounded
from lit_methods.transport.wasserstein import OTLoss, WassersteinDistance

__all__ = ["PointRegistration"]


class PointRegistration(LightningModule):
    """Learn the rotation and translation ``x -> R x + t`` that carries source sets to target sets.

    Batches are :class:`~lit_methods.batches.PointSetBatch`. ``R`` is the exponential of a skew matrix, hence a rotation
    throughout; it starts as the identity.

    Logs ``train/loss``, and ``{val,test}/distance``, the mean Wasserstein-2 distance of moved sources and targets, and,
    in two and three dimensions, ``{val,test}/angle``, the angle of ``R`` in degrees.

    Args:
        dimensions: of the points, >= 1.
        eta: inverse regularization of the loss, > 0, in units of 1 / squared distance.
        debias: use the Sinkhorn divergence.
        optimizer: builds the optimizer.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        dimensions: int = 2,
        eta: float = 20.0,
        debias: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1),
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        self.save_hyperparameters(ignore=live_arguments(locals()))
        if dimensions < 1:
            raise ValueError(f"dimensions must be at least 1, got {dimensions}")
        self.loss = OTLoss(eta, debias=debias)
        self.optimizer = optimizer
        self.skew = nn.Parameter(torch.zeros(dimensions, dimensions))
        self.translation = nn.Parameter(torch.zeros(dimensions))
        self.val_distance = WassersteinDistance()
        self.test_distance = WassersteinDistance()

    def rotation(self) -> Tensor:
        """``R``, ``(dimensions, dimensions)``."""
        skew = self.skew.float() if self.skew.dtype == torch.bfloat16 else self.skew
        return torch.matrix_exp(skew - skew.T)

    def forward(self, points: Tensor) -> Tensor:
        """Points moved by ``R`` and ``t``, ``(..., n, dimensions)``."""
        return points @ self.rotation().T + self.translation

    def training_step(self, batch: PointSetBatch, batch_idx: int) -> Tensor:
        """Mean loss of the pairs."""
        loss = self.loss(self(batch.source), batch.target)
        self.log("train/loss", loss, batch_size=len(batch.source))
        return loss

    def validation_step(self, batch: PointSetBatch, batch_idx: int) -> None:
        """Log distance and angle."""
        self._evaluate(batch, "val")

    def test_step(self, batch: PointSetBatch, batch_idx: int) -> None:
        """Log distance and angle."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: PointSetBatch, batch_idx: int) -> Tensor:
        """The moved sources."""
        return self(batch.source)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The injected optimizer over rotation and translation."""
        return self.optimizer(self.parameters())

    def _evaluate(self, batch: PointSetBatch, stage: str) -> None:
        distance = self.val_distance if stage == "val" else self.test_distance
        distance(self(batch.source).float(), batch.target.float())
        self.log(f"{stage}/distance", distance, batch_size=len(batch.source))
        size = len(self.translation)
        if size in (2, 3):
            cosine = (self.rotation().diagonal().sum() - (size - 2)) / 2
            angle = cosine.clamp(-1, 1).acos().rad2deg()
            self.log(f"{stage}/angle", angle, batch_size=len(batch.source), sync_dist=True)
