"""Denoisers in closed form: exact teachers, and the smallest students, to try methods on."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.processes import EDM


def gaussian_mixture(
    means: Sequence[Sequence[float]],
    stds: Sequence[float],
    weights: Sequence[float] | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    trainable: bool = False,
) -> Denoiser:
    """The exact denoiser of a mixture of spherical Gaussians, under :class:`~lit_methods.diffusion.EDM`.

    Args:
        means: of the components, each of ``dim`` numbers.
        stds: standard deviations of the components, > 0.
        weights: of the components, > 0, scaled to sum 1; ``None``: equal.
        sigma_min: smallest noise, > 0.
        sigma_max: noise that sampling starts from, > ``sigma_min``.
        trainable: whether means, standard deviations and weights are parameters.

    Raises:
        ValueError: an argument out of range, or of another length.
    """
    weights = [1.0] * len(means) if weights is None else weights
    if not means or not len(means) == len(stds) == len(weights) or len({len(mean) for mean in means}) > 1:
        raise ValueError(
            "means, stds and weights must be equally many, and means equally long, got "
            f"{list(means)}, {list(stds)} and {list(weights)}"
        )
    if not all(math.isfinite(value) for mean in means for value in mean):
        raise ValueError(f"means must be finite, got {means}")
    for name, values in (("stds", stds), ("weights", weights)):
        if not all(0 < value < math.inf for value in values):
            raise ValueError(f"{name} must be > 0 and finite, got {list(values)}")
    net = _Mixture(torch.tensor(means), torch.tensor(stds).log(), torch.tensor(weights).log(), trainable)
    return Denoiser(net, EDM(sigma_min, sigma_max), "x0")


def affine_generator(
    loc: Sequence[float], scale: float = 1.0, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Denoiser:
    """A generator ``loc + scale z`` of noise ``z = x / sigma``, with ``loc`` and ``scale`` as its parameters.

    Args:
        loc: where it begins, ``dim`` numbers.
        scale: standard deviation that it begins with, > 0.
        sigma_min: smallest noise of its process, :class:`~lit_methods.diffusion.EDM`, > 0.
        sigma_max: noise that it starts from, > ``sigma_min``.

    Raises:
        ValueError: an argument out of range.
    """
    if not loc or not all(math.isfinite(value) for value in loc):
        raise ValueError(f"loc must be one or more finite numbers, got {list(loc)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be > 0 and finite, got {scale}")
    return Denoiser(_Affine(torch.tensor(loc), scale), EDM(sigma_min, sigma_max), "x0")


class _Mixture(nn.Module):
    def __init__(self, means: Tensor, log_stds: Tensor, log_weights: Tensor, trainable: bool) -> None:
        super().__init__()
        self.means = nn.Parameter(means, requires_grad=trainable)
        self.log_stds = nn.Parameter(log_stds, requires_grad=trainable)
        self.log_weights = nn.Parameter(log_weights, requires_grad=trainable)
        self.sample_shape = [means.shape[1]]

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Expected clean sample of points ``(batch, dim)``."""
        variances = (2 * self.log_stds).exp()
        noisy = variances + sigma[:, None] ** 2
        away = x[:, None] - self.means
        logits = self.log_weights - 0.5 * away.square().sum(2) / noisy - 0.5 * x.shape[1] * noisy.log()
        centres = self.means + (variances / noisy)[..., None] * away
        return (logits.softmax(1)[..., None] * centres).sum(1).to(x.dtype)


class _Affine(nn.Module):
    def __init__(self, loc: Tensor, scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc)
        self.scale = nn.Parameter(torch.tensor(scale))
        self.sample_shape = [len(loc)]

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``loc + scale x / sigma``."""
        return (self.loc + self.scale * x / sigma[:, None]).to(x.dtype)
