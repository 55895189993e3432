"""A discriminator of noisy samples that reads the features of a diffusion model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_methods.diffusion.denoiser import Denoiser


class FeatureDiscriminator(nn.Module):
    """Small heads, each on the output of one layer of a denoiser; real against student.

    The head of a feature map ``(batch, channels, height, width)`` halves it by convolutions down to 4x4 and takes that
    to one logit, with group normalisation and SiLU between; of tokens ``(batch, tokens, channels)``, which are put on
    their square, a convolution halves the width and a mean over places gives the logit, with leaky ReLU; of vectors
    ``(batch, features)`` a perceptron with one hidden layer. All are those of the authors' code but the last, for
    networks without places, and the mean of the tokens' logits, which there are all used.

    Args:
        layers: of the network, in the order in which they run; ``None``: those that it names itself (the bottleneck of
            a ``UNet2D``, the middle block of a ``DiT``, the last block of a ``TimeMLP``).
        shapes: shape of each layer's output without its first dimension; ``None``: filled in by
            :class:`~lit_methods.diffusion.FDistill`, which asks the network.

    Raises:
        ValueError: no layer, or shapes that are not as many; a feature of another kind.
    """

    def __init__(self, layers: Sequence[str] | None = None, shapes: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__()
        if layers is not None and not layers:
            raise ValueError("layers must name at least one layer, got none")
        if layers is not None and shapes is not None and len(layers) != len(shapes):
            raise ValueError(f"shapes must be as many as layers, {len(layers)}, got {len(shapes)}")
        self.layers = None if layers is None else list(layers)
        self.heads = nn.ModuleList()
        if shapes is not None:
            self.build(shapes)

    def build(self, shapes: Sequence[Sequence[int]]) -> None:
        """Make the heads for features of these shapes."""
        self.heads = nn.ModuleList(_head(list(shape)) for shape in shapes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits ``(batch, layers)``; positive where a sample looks real."""
        if len(features) != len(self.heads):
            raise ValueError(f"features must be as many as heads, {len(self.heads)}, got {len(features)}")
        dtype = next(self.parameters()).dtype
        return torch.cat([head(x.to(dtype)) for head, x in zip(self.heads, features, strict=True)], 1)


def fitted_discriminator(given: nn.Module | None, trunk: Denoiser) -> nn.Module:
    """The discriminator, or one with heads for the features of ``trunk``, where it has none yet.

    Raises:
        ValueError: the trunk's network does not tell what the heads need.
    """
    discriminator = FeatureDiscriminator() if given is None else given
    if not isinstance(discriminator, FeatureDiscriminator) or len(discriminator.heads):
        return discriminator
    layers = trunk.feature_layers if discriminator.layers is None else discriminator.layers
    if trunk.sample_shape is None or not layers:
        raise ValueError(
            "discriminator must be given, as a network of (x, t) or a FeatureDiscriminator(layers, shapes), for a "
            f"teacher whose network has no sample_shape or feature_layers, got {type(trunk.net).__name__}"
        )
    device = next((p.device for p in trunk.parameters()), torch.device("cpu"))
    with torch.no_grad():
        null = None if trunk.conditioning is None else trunk.conditioning.nulls(1).to(device)
        found = trunk.features(torch.zeros(1, *trunk.sample_shape, device=device), trunk.process.t_max, layers, null)
    discriminator.build([list(x.shape[1:]) for x in found])
    return discriminator


def _head(shape: list[int]) -> nn.Module:
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(shape[0], shape[0]), nn.SiLU(), nn.Linear(shape[0], 1))
    if len(shape) == 2:
        return _TokenHead(*shape)
    if len(shape) != 3:
        raise ValueError(f"shapes must be of vectors, tokens or feature maps, got {shape}")
    channels, side = shape[0], min(shape[1:])
    layers: list[nn.Module] = []
    while side > 8:
        layers += _block(channels, channels, 4, stride=2, padding=1)
        side //= 2
    if side > 4:
        layers += _block(channels, channels, 4, stride=2, padding=1)
        side //= 2
    # A map of another size than 4x4 ends in the mean of what is left.
    layers += _block(channels, channels, min(4, side), stride=min(4, side))
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _block(inner: int, outer: int, kernel: int, stride: int, padding: int = 0) -> list[nn.Module]:
    convolution = nn.Conv2d(inner, outer, kernel, stride, padding)
    return [convolution, nn.GroupNorm(_groups(outer), outer), nn.SiLU()]


def _groups(channels: int) -> int:
    """A quarter of few channels, else the largest divisor up to 32."""
    if channels <= 32:
        return math.gcd(max(1, channels // 4), channels)
    return max(n for n in range(1, 33) if channels % n == 0)


class _TokenHead(nn.Module):
    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.side = math.isqrt(tokens)
        if self.side**2 != tokens or self.side < 2:
            raise ValueError(f"shapes of tokens must be those of a square of 2x2 or more, got {[tokens, channels]}")
        half = max(1, channels // 2)
        convolution = nn.Conv2d(channels, half, min(4, self.side), stride=2, padding=1 if self.side > 2 else 0)
        self.net = nn.Sequential(
            convolution, nn.GroupNorm(_groups(half), half), nn.LeakyReLU(0.2), nn.Conv2d(half, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(1, 2).unflatten(2, (self.side, self.side))).flatten(1).mean(1, keepdim=True)


class PointDiscriminator(nn.Module):
    """A perceptron on noisy points and their noise level, for processes whose time is the noise (``edm``).

    It sees ``u = x / sqrt(t^2 + data_std^2)``, ``u^2`` and ``log(t) / 2``: a ratio of two Gaussians is easy to hold.

    Args:
        dim: numbers in a point, >= 1.
        data_std: standard deviation of the data, > 0.
        width: of the two hidden layers, >= 1.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, dim: int, data_std: float = 1.0, width: int = 64) -> None:
        super().__init__()
        if min(dim, width) < 1:
            raise ValueError(f"dim and width must be >= 1, got {dim} and {width}")
        if not 0 < data_std < math.inf:
            raise ValueError(f"data_std must be > 0 and finite, got {data_std}")
        self.data_std = data_std
        self.net = nn.Sequential(
            nn.Linear(2 * dim + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits ``(batch,)`` of points ``(batch, dim)`` at times ``(batch,)``."""
        t = t[:, None]
        u = x / (t**2 + self.data_std**2).sqrt()
        dtype = next(self.parameters()).dtype
        return self.net(torch.cat([u, u**2, 0.5 * t.log()], 1).to(dtype))[:, 0]
