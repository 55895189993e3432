"""The PV-RNN: a recurrent network of several timescales with Gaussian latents, and what it can do."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_methods.vi.pv_rnn.recurrence import Recurrence
from lit_methods.vi.pv_rnn.softmax_code import SoftmaxCode


class PVRNNOutput(NamedTuple):
    """What a run of the network gives.

    Attributes:
        mean: predicted observations ``(batch, steps, output_size)``.
        kl: ``KL(q || p)`` in nats, summed over each layer's units, ``(batch, steps, layers)``; 0 where the prior drove.
        prior_scale: standard deviations of the prior ``(batch, steps, sum of latent_sizes)``.
        states: the states ``h`` after each step ``(batch, steps, sum of hidden_sizes)``; the last one goes on a run.
        logits: with a :class:`SoftmaxCode` the output's logits ``(batch, steps, output_size, units)``, else ``None``.
    """

    mean: Tensor
    kl: Tensor
    prior_scale: Tensor
    states: Tensor
    logits: Tensor | None


class PVRNN(nn.Module):
    """Layers of leaky tanh units, each with Gaussian latents; adaptive vectors instead of an encoder.

    Layer 1 is the fastest and alone makes the output; neighbouring layers read each other's last step::

        mu_p, log sigma_p = tanh(W_pm d + b_pm), W_ps d + b_ps          of the layer's own d; N(0, I) at the start
        mu_q, log sigma_q = tanh(W_qm d + b_qm + A_mu), W_qs d + b_qs + A_sigma
        z = mu + sigma eps                                              of q to recognise, of p to generate
        h = (1 - 1/tau) h + (W_dd d + W_zd z + W_up d_above + W_down d_below + b) / tau,    d = tanh(h)

    All layers are one matrix whose forbidden blocks are zero. A step costs two matrix products of the sizes
    ``(batch, D) x (D, D + 4 Z)`` and ``(batch, Z) x (Z, D)``, with ``D`` and ``Z`` the sums of the layers' sizes; twice
    as many backward. Everything is computed in float32 at least, also under autocast. Nothing synchronises with a GPU.

    Source: Ahmadi and Tani, "A Novel Predictive-Coding-Inspired Variational RNN Model for Online Prediction and
    Recognition", arXiv 1811.01339. The paper came without code; where descendants of its code differ (``bottom_up``,
    ``posterior_uses_state``, the first step's prior) both are there.

    Example:
        >>> network = PVRNN(output_size=2, hidden_sizes=[20, 10], latent_sizes=[2, 1], time_constants=[4.0, 8.0])
        >>> network.generate(steps=30, batch=5).mean.shape
        torch.Size([5, 30, 2])

    Args:
        output_size: numbers in one observation, >= 1.
        hidden_sizes: units of each layer, from the fastest to the slowest, >= 1.
        latent_sizes: latents of each layer, >= 1.
        time_constants: ``tau`` of each layer, in steps, >= 1; 1 forgets at once.
        bottom_up: whether layers read the one below.
        posterior_uses_state: whether the posterior sees ``d``; else its adaptive vectors alone.
        output: ``"tanh"`` for observations in (-1, 1), ``"linear"``, or a :class:`SoftmaxCode`.
        log_sigma_bounds: smallest and largest ``log sigma`` of both distributions; ``None``: no bounds.

    Raises:
        ValueError: an argument out of range, or lists of different lengths.
    """

    weight_mask: Tensor
    latent_mask: Tensor
    tau: Tensor

    def __init__(
        self,
        output_size: int,
        hidden_sizes: Sequence[int] = (40, 20),
        latent_sizes: Sequence[int] = (2, 1),
        time_constants: Sequence[float] = (2.0, 8.0),
        bottom_up: bool = True,
        posterior_uses_state: bool = True,
        output: Literal["tanh", "linear"] | SoftmaxCode = "tanh",
        log_sigma_bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if output_size < 1:
            raise ValueError(f"output_size must be >= 1, got {output_size}")
        if not len(hidden_sizes) == len(latent_sizes) == len(time_constants) >= 1:
            lengths = f"{len(hidden_sizes)}, {len(latent_sizes)} and {len(time_constants)}"
            raise ValueError(f"hidden_sizes, latent_sizes and time_constants must be of one length >= 1, got {lengths}")
        for name, sizes in (("hidden_sizes", hidden_sizes), ("latent_sizes", latent_sizes)):
            if min(sizes) < 1:
                raise ValueError(f"{name} must hold numbers >= 1, got {list(sizes)}")
        if not all(1 <= tau < math.inf for tau in time_constants):
            raise ValueError(f"time_constants must hold finite numbers >= 1, got {list(time_constants)}")
        if isinstance(output, str) and output not in ("tanh", "linear"):
            raise ValueError(f"output must be 'tanh', 'linear' or a SoftmaxCode, got {output!r}")
        if log_sigma_bounds is not None and not -math.inf < log_sigma_bounds[0] < log_sigma_bounds[1] < math.inf:
            raise ValueError(f"log_sigma_bounds must be two rising finite numbers, got {log_sigma_bounds}")
        self.output_size = output_size
        self.hidden_sizes, self.latent_sizes = list(hidden_sizes), list(latent_sizes)
        self.output = output
        self.log_sigma_bounds = log_sigma_bounds
        if isinstance(output, SoftmaxCode):
            output.check_size(output_size)
        width, units = sum(hidden_sizes), sum(latent_sizes)
        layer_of_state = torch.arange(len(hidden_sizes)).repeat_interleave(torch.tensor(hidden_sizes))
        layer_of_latent = torch.arange(len(latent_sizes)).repeat_interleave(torch.tensor(latent_sizes))
        above = layer_of_state[None] - layer_of_state[:, None]  # +1: the column's layer is above the row's
        own = (layer_of_latent[:, None] == layer_of_state[None]).float()
        reads = (above == 0) | (above == 1) | ((above == -1) & bottom_up)
        posterior = own if posterior_uses_state else torch.zeros_like(own)
        self.register_buffer(
            "weight_mask", torch.cat([reads.float(), posterior, posterior, own, own]), persistent=False
        )
        self.register_buffer("latent_mask", own.t().contiguous(), persistent=False)
        self.register_buffer("tau", torch.tensor(time_constants).float()[layer_of_state], persistent=False)
        self.weight = nn.Parameter(_uniform(width + 4 * units, torch.tensor(hidden_sizes)[layer_of_state]))
        self.bias = nn.Parameter(
            _uniform(1, torch.tensor(hidden_sizes)[torch.cat([layer_of_state, layer_of_latent.repeat(4)])])[0]
        )
        self.latent = nn.Parameter(_uniform(width, torch.tensor(latent_sizes)[layer_of_latent]))
        with torch.no_grad():
            self.weight.mul_(self.weight_mask)
            self.latent.mul_(self.latent_mask)
        numbers = output.units if isinstance(output, SoftmaxCode) else 1
        self.readout = nn.Linear(hidden_sizes[0], output_size * numbers)

    @property
    def adaptive_size(self) -> int:
        """Numbers in an adaptive vector: ``A_mu`` of all layers, then ``A_sigma``."""
        return 2 * sum(self.latent_sizes)

    def forward(self, adaptive: Tensor, state: Tensor | None = None, deterministic: bool = False) -> Tensor:
        """The observations that adaptive vectors stand for: ``posterior(...).mean``."""
        return self.posterior(adaptive, state, deterministic=deterministic).mean

    def posterior(
        self,
        adaptive: Tensor,
        state: Tensor | None = None,
        *,
        first: bool | None = None,
        eps: Tensor | None = None,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        frozen: bool = False,
    ) -> PVRNNOutput:
        """Run the network by its posterior.

        Args:
            adaptive: ``(batch, steps, adaptive_size)``.
            state: where to begin, ``(batch, sum of hidden_sizes)``; ``None``: zeros.
            first: whether the first step is that of a sequence, whose prior is N(0, I); ``None``: if ``state`` is.
            eps: noise ``(steps, batch, sum of latent_sizes)``, instead of drawing it.
            deterministic: ``z = mu``.
            generator: where noise is drawn from; ``None``: torch's global one.
            frozen: no gradient reaches the weights.

        Raises:
            ValueError: a tensor of the wrong shape.
        """
        batch, steps, size = adaptive.shape if adaptive.dim() == 3 else (0, 0, 0)
        units, dtype = sum(self.latent_sizes), self._dtype()
        if size != self.adaptive_size or steps < 1:
            raise ValueError(f"adaptive must be (batch, steps, {self.adaptive_size}), got {tuple(adaptive.shape)}")
        first = state is None if first is None else first
        start = self._start(state, batch)
        eps = self._noise(eps, steps, batch, deterministic, generator)
        with torch.autocast(start.device.type, enabled=False):
            mu, sigma = adaptive.to(dtype).transpose(0, 1).split(units, 2)
            weights = self._weights(frozen)
            h, d, heads = _recur(
                start, torch.cat([sigma, mu], 2), eps, *weights, self.tau.to(dtype).reciprocal(), self.log_sigma_bounds
            )
            log_sigma_q, mu_q, mu_p, log_sigma_p = heads.split(units, 2)
            if first:
                mu_p, log_sigma_p = (torch.cat([torch.zeros_like(x[:1]), x[1:]]) for x in (mu_p, log_sigma_p))
            kl = gaussian_kl(mu_q, log_sigma_q, mu_p, log_sigma_p)
            kl = torch.stack([part.sum(2) for part in kl.split(self.latent_sizes, 2)], 2)
            mean, logits = self._read(d, frozen)
        return PVRNNOutput(mean, kl.transpose(0, 1), log_sigma_p.exp().transpose(0, 1), h.transpose(0, 1), logits)

    @torch.no_grad()
    def generate(
        self,
        steps: int,
        batch: int = 1,
        state: Tensor | None = None,
        *,
        initial_adaptive: Tensor | None = None,
        eps: Tensor | None = None,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> PVRNNOutput:
        """Run the network by its prior, without gradients.

        Args:
            steps: >= 1.
            batch: number of runs, >= 1.
            state: where to go on from, ``(batch, sum of hidden_sizes)``; ``None``: from the start of a sequence.
            initial_adaptive: adaptive vectors ``(batch, n, adaptive_size)`` of the first ``n <= steps`` steps, which
                the posterior drives ("target regeneration").
            eps: noise ``(steps, batch, sum of latent_sizes)``, instead of drawing it.
            deterministic: ``z = mu``.
            generator: where noise is drawn from.

        Raises:
            ValueError: a number out of range or a tensor of the wrong shape.
        """
        if min(steps, batch) < 1:
            raise ValueError(f"steps and batch must be >= 1, got {steps} and {batch}")
        eps = self._noise(eps, steps, batch, deterministic, generator)
        driven = None
        if initial_adaptive is not None and initial_adaptive.shape[1]:
            if len(initial_adaptive) != batch or initial_adaptive.shape[1] > steps:
                raise ValueError(
                    f"initial_adaptive must be ({batch}, at most {steps}, {self.adaptive_size}), got "
                    f"{tuple(initial_adaptive.shape)}"
                )
            driven = self.posterior(initial_adaptive, state, eps=eps[: initial_adaptive.shape[1]])
            state, eps = driven.states[:, -1], eps[initial_adaptive.shape[1] :]
            if not len(eps):
                return driven
        with torch.autocast(eps.device.type, enabled=False):
            rolled = self._roll(self._start(state, batch), eps, first=state is None)
            mean, logits = self._read(rolled.states.tanh().transpose(0, 1), frozen=True)
        rolled = rolled._replace(mean=mean, logits=logits)
        if driven is None:
            return rolled
        joined: Any = (None if a is None else torch.cat([a, b], 1) for a, b in zip(driven, rolled, strict=True))  # type: ignore[list-item]
        return PVRNNOutput(*joined)

    @torch.no_grad()
    def adaptive_like_prior(
        self, steps: int, batch: int = 1, state: Tensor | None = None, *, eps: Tensor | None = None
    ) -> Tensor:
        """Adaptive vectors ``(batch, steps, adaptive_size)`` with which posterior and prior are the same.

        Args:
            steps: >= 1.
            batch: number of runs.
            state: where to go on from; ``None``: from the start of a sequence.
            eps: noise ``(steps, batch, sum of latent_sizes)``; ``None``: ``z = mu``.
        """
        eps = self._noise(eps, steps, batch, eps is None, None)
        with torch.autocast(eps.device.type, enabled=False):
            return self._roll(self._start(state, batch), eps, first=state is None).mean

    def _roll(self, state: Tensor, eps: Tensor, first: bool) -> PVRNNOutput:
        """Steps driven by the prior; ``mean`` holds the adaptive vectors that would do the same."""
        weight, bias, latent = self._weights(frozen=True)
        width, units, rate = state.shape[1], eps.shape[2], self.tau.to(state.dtype).reciprocal()
        states, scales, adaptive = [], [], []
        for t, noise in enumerate(eps):
            gates = torch.addmm(bias, state.tanh(), weight.t())
            drive, log_sigma_q, mu_q, mu_p, log_sigma_p = gates.split([width, *[units] * 4], 1)
            if first and t == 0:
                mu_p, log_sigma_p = torch.zeros_like(mu_p), torch.zeros_like(log_sigma_p)
            if self.log_sigma_bounds is not None:
                log_sigma_p = log_sigma_p.clamp(*self.log_sigma_bounds)
            adaptive.append(torch.cat([mu_p - mu_q, log_sigma_p - log_sigma_q], 1))
            scales.append(log_sigma_p.exp())
            z = torch.addcmul(mu_p.tanh(), scales[-1], noise)
            state = torch.lerp(state, torch.addmm(drive, z, latent.t()), rate)
            states.append(state)
        kl = state.new_zeros(len(state), len(eps), len(self.latent_sizes))
        return PVRNNOutput(torch.stack(adaptive, 1), kl, torch.stack(scales, 1), torch.stack(states, 1), None)

    def _dtype(self) -> torch.dtype:
        return torch.promote_types(torch.float32, self.weight.dtype)

    def _weights(self, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        weights = (self.weight * self.weight_mask, self.bias, self.latent * self.latent_mask)
        weight, bias, latent = ((x.detach() if frozen else x).to(self._dtype()) for x in weights)
        return weight, bias, latent

    def _start(self, state: Tensor | None, batch: int) -> Tensor:
        shape = (batch, sum(self.hidden_sizes))
        if state is None:
            return torch.zeros(shape, dtype=self._dtype(), device=self.weight.device)
        if state.shape != shape:
            raise ValueError(f"state must be {shape}, got {tuple(state.shape)}")
        return state.to(self._dtype())

    def _noise(
        self, eps: Tensor | None, steps: int, batch: int, deterministic: bool, generator: torch.Generator | None
    ) -> Tensor:
        shape = (steps, batch, sum(self.latent_sizes))
        place: dict[str, Any] = {"dtype": self._dtype(), "device": self.weight.device}
        if deterministic:
            return torch.zeros(shape, **place)
        if eps is None:
            return torch.randn(shape, generator=generator, **place)
        if eps.shape != shape:
            raise ValueError(f"eps must be {shape}, got {tuple(eps.shape)}")
        return eps.to(**place)

    def _read(self, d: Tensor, frozen: bool) -> tuple[Tensor, Tensor | None]:
        """Observations, and logits if there are any, of ``d`` (steps, batch, D)."""
        weight, bias = ((x.detach() if frozen else x).to(d.dtype) for x in (self.readout.weight, self.readout.bias))
        numbers = nn.functional.linear(d[..., : self.hidden_sizes[0]].transpose(0, 1), weight, bias)
        if isinstance(self.output, SoftmaxCode):
            logits = numbers.unflatten(2, (self.output_size, -1))
            return self.output.decode(logits.softmax(-1)), logits
        return (numbers.tanh() if self.output == "tanh" else numbers), None


_recur = torch.compiler.disable(Recurrence.apply)  # written out by hand already; a compiler would unroll all steps


def gaussian_kl(mu_q: Tensor, log_sigma_q: Tensor, mu_p: Tensor, log_sigma_p: Tensor) -> Tensor:
    """``KL(N(mu_q, sigma_q^2) || N(mu_p, sigma_p^2))`` of each unit, in nats; shapes broadcast."""
    gap = log_sigma_p - log_sigma_q
    return gap + 0.5 * ((-2 * gap).exp() + ((mu_q - mu_p) * (-log_sigma_p).exp()).square() - 1)


def _uniform(rows: int, fan_in: Tensor) -> Tensor:
    """Numbers ``(rows, len(fan_in))`` between ``-1/sqrt(fan_in)`` and ``1/sqrt(fan_in)``, as nn.Linear has them."""
    return (2 * torch.rand(rows, len(fan_in)) - 1) * fan_in.float().rsqrt()
