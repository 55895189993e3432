"""A small GAN on eight Gaussians around a ring: the classic test of optimizers for games."""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import softplus
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lit_methods.games.small_gain.games import NetworkGame
from lit_methods.hyperparameters import live_arguments
from lit_methods.nets import MLP
from lit_methods.optim import OptimisticAdam
from lit_methods.precision import load_unrounded

__all__ = ["RingGAN"]


class RingGAN(LightningModule):
    """Generator and discriminator on a mixture of Gaussians on the unit ring, trained by simultaneous gradients.

    The generator minimises the non-saturating loss, the discriminator the logistic loss. One loss holds both: each
    player's term sees the other's weights as constants, so one backward pass gives the gradient field of the game, and
    one optimizer under automatic optimization plays both sides (also those that look ahead with a closure).

    Samples are drawn in ``training_step`` from the global generator (the callback ``ExactResume`` keeps it).
    Validation logs, of 2000 generated points: ``val/modes``, the number of Gaussians that get at least 2 % of the
    points within three standard deviations; ``val/quality``, the share of points within three standard deviations of
    some Gaussian.

    Args:
        modes: number of Gaussians, >= 1.
        std: their standard deviation, > 0, on a ring of radius 1.
        latent_dim: coordinates of the generator's noise, >= 1.
        hidden_features: widths of both networks' hidden layers.
        batch_size: points a step, >= 1.
        steps_per_epoch: steps an epoch of the built-in dataloader, >= 1.
        optimizer: builds the optimizer over both networks.

    Raises:
        ValueError: an argument out of range.
    """

    centers: Tensor

    def __init__(
        self,
        modes: int = 8,
        std: float = 0.05,
        latent_dim: int = 16,
        hidden_features: tuple[int, ...] = (64, 64),
        batch_size: int = 256,
        steps_per_epoch: int = 500,
        optimizer: OptimizerCallable = lambda params: OptimisticAdam(params, lr=1e-3, betas=(0.5, 0.9)),
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        for name, value in (
            ("modes", modes),
            ("latent_dim", latent_dim),
            ("batch_size", batch_size),
            ("steps_per_epoch", steps_per_epoch),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < std < math.inf:
            raise ValueError(f"std must be > 0 and finite, got {std}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.generator = MLP(latent_dim, list(hidden_features), 2)
        self.discriminator = MLP(2, list(hidden_features), 1)
        self.modes, self.std, self.latent_dim = modes, std, latent_dim
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.optimizer = optimizer
        self._game: NetworkGame | None = None
        angles = 2 * math.pi * torch.arange(modes) / modes
        self.register_buffer("centers", torch.stack([angles.cos(), angles.sin()], 1), persistent=False)

    def forward(self, noise: Tensor) -> Tensor:
        """Generated points ``(batch, 2)`` of noise ``(batch, latent_dim)``."""
        return self.generator(noise)

    def blocks(self) -> list[Tensor]:
        """The networks' parameters as two vectors, generator first, for :func:`~lit_methods.games.certify`."""
        return self._fixed_batch_game().blocks()

    def losses(self, *blocks: Tensor) -> Sequence[Tensor]:
        """Generator's and discriminator's loss with these parameters, always on the same batch of points and noise."""
        return self._fixed_batch_game().losses(*blocks)

    def _fixed_batch_game(self) -> NetworkGame:
        if self._game is not None:
            return self._game
        draw = torch.Generator().manual_seed(0)
        picks = torch.randint(self.modes, (self.batch_size,), generator=draw)
        noise = torch.randn(self.batch_size, self.latent_dim, generator=draw, dtype=torch.float64)
        real = self.centers.cpu().double()[picks]
        real = real + self.std * torch.randn(self.batch_size, 2, generator=draw, dtype=torch.float64)

        def losses() -> list[Tensor]:
            on_fake = self.discriminator(self.generator(noise))
            return [
                softplus(-on_fake).mean(),
                softplus(-self.discriminator(real)).mean() + softplus(on_fake).mean(),
            ]

        self._game = NetworkGame(losses, [self.generator, self.discriminator])
        return self._game

    def train_dataloader(self) -> DataLoader:
        """A loader of ``steps_per_epoch`` indices: the data is drawn in the step."""
        return DataLoader(range(self.steps_per_epoch))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        """One batch: validation draws its own points."""
        return DataLoader(range(1))  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The sum of both players' losses, each a constant to the other."""
        picks = torch.randint(self.modes, (self.batch_size,), device=self.device)
        real = self.centers[picks] + self.std * torch.randn(self.batch_size, 2, device=self.device)
        fake = self(torch.randn(self.batch_size, self.latent_dim, device=self.device))
        of_discriminator = (
            softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(fake.detach())).mean()
        )
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        of_generator = softplus(-functional_call(self.discriminator, frozen, fake)).mean()
        self.log("train/generator", of_generator.detach(), batch_size=self.batch_size)
        self.log("train/discriminator", of_discriminator.detach(), batch_size=self.batch_size)
        return of_discriminator + of_generator

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the modes that are covered, and the share of points near one."""
        self._evaluate("val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the same under ``test/``."""
        self._evaluate("test")

    def _evaluate(self, stage: str) -> None:
        points = self(torch.randn(2000, self.latent_dim, device=self.device))
        distances = (points[:, None] - self.centers).norm(dim=-1)
        near = distances < 3 * self.std
        self.log(f"{stage}/modes", (near.float().mean(0) >= 0.02).sum().float(), sync_dist=True, batch_size=1)
        self.log(f"{stage}/quality", near.any(1).float().mean(), sync_dist=True, batch_size=1)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Generated points ``(2000, 2)``."""
        return self(torch.randn(2000, self.latent_dim, device=self.device))

    def configure_optimizers(self) -> Optimizer:
        """The injected optimizer over both players."""
        return self.optimizer(self.parameters())
