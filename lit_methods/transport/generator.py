"""A generator trained by the Sinkhorn divergence between what it makes and the data (Genevay et al., AISTATS 2018)."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_methods.batches import SupervisedBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.precision import load_unrounded
from lit_methods.transport.wasserstein import OTLoss, WassersteinDistance

__all__ = ["OTGenerator"]


class OTGenerator(LightningModule):
    """Train ``network(noise)`` so that a batch of its outputs is near a batch of data in optimal transport.

    A batch of data is one point set, each flattened example a point; labels are not used. There is no critic to train.

    Logs ``train/loss``, and ``{val,test}/distance``, the Wasserstein-2 distance of a validation batch and as many
    generated examples, averaged over batches.

    Args:
        network: maps noise ``(batch, latent_features)`` to flattened examples ``(batch, features)``.
        latent_features: standard normal inputs of the network, >= 1.
        eta: inverse regularization of the loss, > 0, in units of 1 / squared distance of examples.
        debias: subtract both sets' transport to themselves, without which what is generated shrinks to the mean.
        optimizer: builds the optimizer.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        latent_features: int,
        eta: float = 2.0,
        debias: bool = True,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        self.save_hyperparameters(ignore=live_arguments(locals()))
        if latent_features < 1:
            raise ValueError(f"latent_features must be at least 1, got {latent_features}")
        self.network = network
        self.latent_features = latent_features
        self.loss = OTLoss(eta, debias=debias)
        self.optimizer = optimizer
        self.val_distance = WassersteinDistance()
        self.test_distance = WassersteinDistance()

    def forward(self, noise: Tensor) -> Tensor:
        """Examples ``(batch, features)`` of noise ``(batch, latent_features)``."""
        return self.network(noise)

    def generate(self, count: int) -> Tensor:
        """``count`` new examples; ranks whose random states agree still make different ones."""
        world, rank = (1, 0) if self._trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        noise = torch.randn(world * count, self.latent_features, device=self.device)
        return self(noise[rank * count : (rank + 1) * count])

    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> Tensor:
        """The loss between as many generated examples and the batch."""
        loss = self.loss(self.generate(len(batch.x)), batch.x.flatten(1))
        self.log("train/loss", loss, batch_size=len(batch.x))
        return loss

    def validation_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Log the distance."""
        self._evaluate(batch, "val")

    def test_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Log the distance."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: SupervisedBatch, batch_idx: int) -> Tensor:
        """As many generated examples as the batch has."""
        return self.generate(len(batch.x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The injected optimizer over the network."""
        return self.optimizer(self.parameters())

    def _evaluate(self, batch: SupervisedBatch, stage: str) -> None:
        distance = self.val_distance if stage == "val" else self.test_distance
        distance(self.generate(len(batch.x)).float(), batch.x.flatten(1).float())
        self.log(f"{stage}/distance", distance, batch_size=len(batch.x))
