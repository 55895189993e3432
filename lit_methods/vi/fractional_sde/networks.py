"""Drifts, diffusions, controls and encoders; anything with the same call does as well."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Encoding(NamedTuple):
    """What an encoder makes of a batch of series.

    Attributes:
        mean: of the state at the first time, ``(batch, state_dim)``.
        log_variance: of it, likewise.
        context: what the control is told, ``(batch, T, features)`` or ``(batch, features)``.
        content: what the decoder is told beside the state, ``(batch, features)``, or ``None``.
    """

    mean: Tensor
    log_variance: Tensor
    context: Tensor
    content: Tensor | None


class LinearDrift(nn.Module):
    """``-rate x``; the drift of an Ornstein-Uhlenbeck process, and none at all for a rate of 0.

    Args:
        rate: finite.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not math.isfinite(rate):
            raise ValueError(f"rate must be finite, got {rate}")
        self.rate = rate

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """States ``(batch, state_dim)`` to drifts of the same shape."""
        return -self.rate * x


class DriftMLP(nn.Module):
    """A drift that a network with tanh units learns from the state, and from the time if wanted.

    Args:
        state_dim: >= 1.
        hidden_dims: widths, each >= 1.
        periodic_time: tell it ``sin t`` and ``cos t``.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, state_dim: int, hidden_dims: Sequence[int] = (64, 64), periodic_time: bool = False) -> None:
        super().__init__()
        check_widths(hidden_dims, state_dim=state_dim)
        self.clock = Clock() if periodic_time else None
        self.layers = tanh_layers([state_dim + 2 * periodic_time, *hidden_dims, state_dim])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """States ``(batch, state_dim)`` at a time ``()`` to drifts of the same shape."""
        return self.layers(x if self.clock is None else torch.cat([x, self.clock(t, x)], -1))


class DiagonalDiffusion(nn.Module):
    """A positive diffusion, each entry a network of its own entry of the state; all of them in one product.

    Args:
        state_dim: >= 1.
        hidden_dims: widths of each network, >= 1.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, state_dim: int, hidden_dims: Sequence[int] = (200, 200)) -> None:
        super().__init__()
        check_widths(hidden_dims, state_dim=state_dim)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for width, out in pairwise([1, *hidden_dims, 1]):
            bound = width**-0.5
            self.weights.append(nn.Parameter(torch.empty(state_dim, width, out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(state_dim, 1, out).uniform_(-bound, bound)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """States ``(batch, state_dim)`` to factors > 0 of the same shape."""
        hidden = x.T[..., None]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden.tanh() if i else hidden, weight)
        return functional.softplus(hidden[..., 0].T)


class ControlMLP(nn.Module):
    """The posterior's control: a network with tanh units, zero before training, so that it starts at the prior.

    Args:
        state_dim: >= 1.
        num_ou: number of processes of the noise, >= 1.
        hidden_dims: widths, each >= 1.
        context_dim: features of the context, >= 0.
        periodic_time: tell it ``sin t`` and ``cos t``; without context it needs to know the time.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        state_dim: int,
        num_ou: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        periodic_time: bool = True,
    ) -> None:
        super().__init__()
        check_widths(hidden_dims, state_dim=state_dim, num_ou=num_ou)
        if context_dim < 0:
            raise ValueError(f"context_dim must be >= 0, got {context_dim}")
        self.clock = Clock() if periodic_time else None
        self.context_dim = context_dim
        inputs = state_dim * (1 + num_ou) + context_dim + 2 * periodic_time
        self.layers = tanh_layers([inputs, *hidden_dims, state_dim])
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """Controls ``(batch, state_dim)`` of states, memory ``(batch, state_dim, K)``, a time and a context."""
        parts = [x, y.flatten(1)]
        if self.clock is not None:
            parts.append(self.clock(t, x))
        if (0 if context is None else context.shape[-1]) != self.context_dim:
            raise ValueError(
                f"context_dim must be that of the context, got {self.context_dim} and "
                f"{None if context is None else tuple(context.shape)}"
            )
        if context is not None:
            parts.append(context.to(x.dtype))
        return self.layers(torch.cat(parts, -1))


class NoisePosterior(nn.Module):
    """A Gaussian posterior of the noise's memory ``Y(0)`` of kind "I", in coordinates in which its prior is standard.

    Without it ``Y(0)`` comes from its prior also under the posterior, as in the authors' code, which leaves the bound
    loose even for the best control. It starts at the prior.

    Args:
        state_dim: >= 1.
        num_ou: >= 1.
        context_dim: features of the context at the first time, which it then depends on; 0: the same for all series.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, state_dim: int, num_ou: int, context_dim: int = 0) -> None:
        super().__init__()
        check_widths((), state_dim=state_dim, num_ou=num_ou)
        if context_dim < 0:
            raise ValueError(f"context_dim must be >= 0, got {context_dim}")
        self.shape = (state_dim, num_ou)
        size = state_dim * (num_ou + num_ou * (num_ou + 1) // 2)
        self.free = nn.Parameter(torch.zeros(size)) if not context_dim else None
        self.layer = nn.Linear(context_dim, size) if context_dim else None
        if self.layer is not None:
            nn.init.zeros_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

    def forward(self, batch: int, context: Tensor | None, noise: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """A sample and its divergence from the prior.

        Args:
            batch: number of rows.
            context: ``(batch, features)`` or ``None``.
            noise: standard normal, ``(batch, state_dim, K)``.
            factor: of the prior's covariance, ``(K, K)``.

        Returns:
            y0: ``(batch, state_dim, K)``.
            kl: ``(batch,)`` in nats.
        """
        state_dim, k = self.shape
        if self.layer is not None:
            assert context is not None
            raw = self.layer(context).to(noise.dtype)
        else:
            assert self.free is not None
            raw = self.free.to(noise.dtype).expand(batch, -1)
        mean, entries = raw.unflatten(-1, (state_dim, -1)).split([k, k * (k + 1) // 2], -1)
        rows, columns = torch.tril_indices(k, k, device=raw.device)
        lower = noise.new_zeros(batch, state_dim, k, k)
        lower[..., rows, columns] = entries
        log_scale = lower.diagonal(dim1=-2, dim2=-1)
        lower = lower.tril(-1) + torch.diag_embed(log_scale.exp())
        kl = 0.5 * (mean.square().sum(-1) + lower.square().sum((-2, -1)) - k) - log_scale.sum(-1)
        white = mean + (lower * noise[..., None, :]).sum(-1)
        return (white[..., None, :] * factor.to(white)).sum(-1), kl.sum(-1)


class SeriesEncoder(nn.Module):
    """Reads whole series, with holes and any spacing, by a recurrent network in both directions.

    Args:
        features: numbers observed at a time, >= 1.
        state_dim: >= 1.
        context_dim: features of the context, >= 1.
        hidden_dim: width of each direction, >= 1.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, features: int, state_dim: int, context_dim: int = 16, hidden_dim: int = 32) -> None:
        super().__init__()
        check_widths((), features=features, state_dim=state_dim, context_dim=context_dim, hidden_dim=hidden_dim)
        self.rnn = nn.GRU(features + 2, hidden_dim, batch_first=True, bidirectional=True)
        self.context = nn.Linear(2 * hidden_dim, context_dim)
        self.start = nn.Linear(2 * hidden_dim, 2 * state_dim)

    def forward(self, times: Tensor, values: Tensor, mask: Tensor) -> Encoding:
        """Encode ``values`` ``(batch, T, features)`` at ``times`` ``(T,)``, seen where ``mask`` ``(batch, T)`` says."""
        seen = mask[..., None]
        gaps = functional.pad(times.diff(), (1, 0)).to(values).expand(len(values), -1)[..., None]
        hidden, _ = self.rnn(torch.cat([torch.where(seen, values, 0.0), seen.to(values), gaps], -1))
        mean, log_variance = self.start(hidden[:, 0]).chunk(2, -1)
        return Encoding(mean, log_variance, self.context(hidden), None)


def check_widths(widths: Sequence[int], **sizes: int) -> None:
    """Refuse layers without units and sizes below 1, by name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
    if not all(width >= 1 for width in widths):
        raise ValueError(f"hidden_dims must hold widths >= 1, got {list(widths)}")


def tanh_layers(dims: Sequence[int]) -> nn.Sequential:
    """Linear layers with tanh in between."""
    layers: list[nn.Module] = []
    for a, b in pairwise(dims):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Clock(nn.Module):
    """``sin t`` and ``cos t`` for every row of states ``(batch, ...)``, as ``(batch, 2)``."""

    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phases", torch.tensor([0.0, math.pi / 2]), persistent=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The time ``()`` for every row."""
        return (t + self.phases).sin().to(x.dtype).expand(len(x), 2)
