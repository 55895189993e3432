"""A variational autoencoder of binary images, as in the paper's measurement of overhead."""

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.nn import functional

from lit_methods.batches import SupervisedBatch
from lit_methods.vi.programmable.programs import observe, sample


class VAEModel(nn.Module):
    """``z ~ N(0, I)``; pixels of ``batch.x`` are Bernoulli, with logits from a network of one hidden layer.

    Values between 0 and 1 count in proportion.

    Args:
        num_pixels: of an image, >= 1.
        latent_dim: size of z, >= 1.
        hidden_dim: width of the hidden layer, >= 1.
    """

    def __init__(self, num_pixels: int = 784, latent_dim: int = 10, hidden_dim: int = 200) -> None:
        super().__init__()
        _check_sizes(num_pixels=num_pixels, latent_dim=latent_dim, hidden_dim=hidden_dim)
        self.latent_dim = latent_dim
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.LeakyReLU(), nn.Linear(hidden_dim, num_pixels)
        )

    def forward(self, batch: SupervisedBatch) -> Tensor:
        """One run; returns the logits of pixels."""
        zeros = batch.x.new_zeros(self.latent_dim)
        z = sample("z", _normal(zeros, torch.ones_like(zeros)))
        logits = self.decoder(z)
        pixels = Bernoulli(logits=logits, validate_args=False)
        observe("x", Independent(pixels, 1, validate_args=False), batch.x.flatten(1))
        return logits


class VAEGuide(nn.Module):
    """``z`` is normal, with means and standard deviations from a network of the image with one hidden layer.

    Args:
        num_pixels: of an image, >= 1.
        latent_dim: size of z, >= 1.
        hidden_dim: width of the hidden layer, >= 1.
    """

    def __init__(self, num_pixels: int = 784, latent_dim: int = 10, hidden_dim: int = 200) -> None:
        super().__init__()
        _check_sizes(num_pixels=num_pixels, latent_dim=latent_dim, hidden_dim=hidden_dim)
        self.encoder = nn.Sequential(
            nn.Linear(num_pixels, hidden_dim), nn.LeakyReLU(), nn.Linear(hidden_dim, 2 * latent_dim)
        )

    def forward(self, batch: SupervisedBatch) -> None:
        """One run."""
        loc, scale = self.encoder(batch.x.flatten(1)).chunk(2, -1)
        sample("z", _normal(loc, functional.softplus(scale)))


def _normal(loc: Tensor, scale: Tensor) -> Independent:
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
