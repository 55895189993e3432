"""SDEs driven by fractional noise, under the prior and under a controlled posterior."""

import math
import warnings
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_methods.fractional_noise import check_times
from lit_methods.vi.fractional_sde.markov_fbm import MarkovFBM

_MANY_STEPS = 10_000


class SDEPath(NamedTuple):
    """Paths of a :class:`FractionalSDE`.

    Attributes:
        x: the state at the given times, ``(batch, T, state_dim)``.
        path_kl: Kullback-Leibler divergence from the prior's paths in nats, ``(batch,)``.
        y: the noise's memory at the last time, ``(batch, state_dim, K)``; pass it on to go on from there.
    """

    x: Tensor
    path_kl: Tensor
    y: Tensor


class FractionalSDE(nn.Module):
    r"""An SDE driven by Markov-approximated fractional noise, and its controlled posterior.

    Prior: :math:`dX = b(X, t) dt + s(X, t) dB`, where :math:`B = \sum_k w_k Y_k` and
    :math:`dY_k = -\gamma_k Y_k dt + dW`, independently for each dimension of ``X``. The posterior adds a control ``u``
    to the Brownian motion, :math:`dW + u(X, Y, t) dt`, which costs :math:`E \int |u|^2 / 2\, dt` nats (Girsanov). All
    three functions are evaluated at the state before the step, and ``X`` takes the same ``dY`` as ``Y``.

    Ito or Stratonovich: "euler" solves the equation as Ito reads it, "milstein" as Stratonovich does. Where ``s``
    does not depend on ``x`` they agree. With ``dX = X dB / 2``, ``X(0) = 1``, ordinary noise, the mean at time 1 is 1
    by "euler" and ``exp(1 / 8)`` by "milstein".

    Steps: an interval between two times gets ``ceil(gap / dt)`` equal steps, so times are hit exactly. Noise is drawn
    before the first step, by number of step. Cost per step: one call of each network, and ``O(K)`` per dimension;
    "milstein" also differentiates the diffusion. One host synchronisation a call, to read the times.

    Example:
        >>> from lit_methods.vi import ControlMLP, LinearDrift, MarkovFBM
        >>> sde = FractionalSDE(LinearDrift(1.0), 1.0, ControlMLP(1, 5), MarkovFBM(hurst=0.7), state_dim=1, dt=0.01)
        >>> sde(torch.zeros(8, 1), torch.tensor([0.0, 0.5, 1.0])).x.shape
        torch.Size([8, 3, 1])

    Args:
        drift: ``drift(x, t)``: states ``(batch, state_dim)`` and a time ``()`` to ``(batch, state_dim)``.
        diffusion: ``s``, diagonal: a number >= 0, or ``diffusion(x, t)`` shaped like ``x``, of which entry ``d`` must
            depend on ``x`` only through ``x[:, d]``.
        control: ``control(x, y, t, context)`` with ``y`` ``(batch, state_dim, K)`` and the context at that time
            ``(batch, features)`` or ``None``, to ``(batch, state_dim)``; ``None``: no posterior.
        noise: the fractional noise.
        state_dim: >= 1.
        dt: longest step, > 0; ``None``: the shortest interval between times over ``substeps``.
        substeps: steps in the shortest interval where ``dt`` is ``None``, >= 1.
        method: "euler" (Ito) or "milstein" (Stratonovich); ``None``: "euler" where ``diffusion`` is a number, else
            "milstein".
        exact_ou: step ``Y`` exactly, with the control held over the step: stable for any ``dt``, and the divergence is
            exact, so the bound on the evidence holds at any ``dt``. It draws up to K numbers per dimension, not one.
        checkpoint_intervals: keep only the states at the given times for the backward pass and repeat the steps in
            between: less memory for a second evaluation.

    Raises:
        ValueError: an argument out of range, or steps too long for the largest speed.
    """

    def __init__(
        self,
        drift: nn.Module,
        diffusion: float | nn.Module,
        control: nn.Module | None,
        noise: MarkovFBM,
        state_dim: int,
        dt: float | None = None,
        substeps: int = 1,
        method: Literal["euler", "milstein"] | None = None,
        exact_ou: bool = False,
        checkpoint_intervals: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(diffusion, int | float) and not 0 <= diffusion < math.inf:
            raise ValueError(f"diffusion must be >= 0 and finite, got {diffusion}")
        if state_dim < 1:
            raise ValueError(f"state_dim must be >= 1, got {state_dim}")
        if dt is not None and not 0 < dt < math.inf:
            raise ValueError(f"dt must be > 0 and finite, or None, got {dt}")
        if substeps < 1:
            raise ValueError(f"substeps must be >= 1, got {substeps}")
        if method not in (None, "euler", "milstein"):
            raise ValueError(f"method must be 'euler' (Ito), 'milstein' (Stratonovich) or None, got {method!r}")
        self.drift, self.diffusion, self.control, self.noise = drift, diffusion, control, noise
        self.state_dim, self.dt, self.substeps = state_dim, dt, substeps
        additive = isinstance(diffusion, int | float)
        self.method = method or ("euler" if additive else "milstein")
        self.exact_ou, self.checkpoint_intervals = exact_ou, checkpoint_intervals

    def forward(
        self,
        x0: Tensor,
        times: Tensor,
        context: Tensor | None = None,
        y0: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> SDEPath:
        """Paths of the posterior.

        Args:
            x0: states at the first time, ``(batch, state_dim)``; their type is that of the computation.
            times: increasing times ``(T,)``, the same for all rows: use the union of all time stamps, and mask what a
                row lacks. The noise starts at the first.
            context: what the control is told: ``(batch, T, features)`` at the given times, interpolated linearly in
                between, or ``(batch, features)``.
            y0: the noise's memory at the first time, ``(batch, state_dim, K)``; ``None``: drawn from its prior.
            generator: of the random numbers, on the states' device.

        Raises:
            ValueError: an argument out of range, or there is no control.
        """
        if self.control is None:
            raise ValueError("control must be given for paths of the posterior, got None: sample_prior needs none")
        return self._integrate(x0, times, self.control, context, y0, generator)

    def sample_prior(
        self, x0: Tensor, times: Tensor, y0: Tensor | None = None, generator: torch.Generator | None = None
    ) -> SDEPath:
        """Paths of the prior; arguments as in :meth:`forward`."""
        return self._integrate(x0, times, None, None, y0, generator)

    def step_counts(self, times: Tensor) -> list[int]:
        """Number of steps in each interval between times.

        Raises:
            ValueError: times that are no increasing grid.
        """
        gaps = check_times(times).diff()
        if not len(gaps):
            return []
        dt = gaps.min() / self.substeps if self.dt is None else self.dt
        # Times in float32 miss a multiple of dt by 1e-5 of it or so; that must not cost a step.
        return [max(1, math.ceil(ratio - 1e-3)) for ratio in (gaps / dt).tolist()]

    def _integrate(
        self,
        x: Tensor,
        times: Tensor,
        control: nn.Module | None,
        context: Tensor | None,
        y: Tensor | None,
        generator: torch.Generator | None,
    ) -> SDEPath:
        grid, counts = check_times(times), self.step_counts(times)
        self._check(x, grid, counts, context, y)
        starts, sizes, left, share = _steps(grid, counts)
        with torch.autocast(x.device.type, enabled=False):
            factors = (
                self.noise.transition(torch.tensor(sizes, dtype=torch.float64))[1].to(x) if self.exact_ou else sizes
            )
            noise = [
                self._draw(size, factor, count, x, generator)
                for size, factor, count in zip(sizes, factors, counts, strict=True)
            ]
            if y is None:
                y = self.noise.sample_initial((len(x), self.state_dim), generator, x.device)
            y = y.to(x)
            varies = self.noise.varies
            weights = self.noise.weights(starts.to(x.device)).to(x) if varies else self.noise.weights().to(x)[None]
            contexts = _interpolate(context, left, share)
            decays, drives = self._constants(torch.tensor(sizes, dtype=torch.float64), x)
            constants = list(zip(decays, drives, strict=True))
        instants = starts.to(x).unbind()
        path, kl, first = [x], x.new_zeros(len(x)), 0
        for count, size, draws, constant in zip(counts, sizes, noise, constants, strict=True):
            part = slice(first, first + count)
            own = weights[part] if varies else weights
            arguments = (x, y, control, instants[part], size, draws, constant, own, contexts[part])
            if self.checkpoint_intervals and torch.is_grad_enabled():
                x, y, more = checkpoint(self._interval, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, y, more = self._interval(*arguments)
            kl = kl + more
            path.append(x)
            first += count
        return SDEPath(torch.stack(path, 1), kl, y)

    def _interval(
        self,
        x: Tensor,
        y: Tensor,
        control: nn.Module | None,
        instants: tuple[Tensor, ...],
        dt: float,
        noise: Tensor,
        constants: tuple[Tensor, Tensor],
        weights: Tensor,
        contexts: list[Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The steps between two given times: state, memory and divergence."""
        decay, drive = constants
        # One row for each step, or the same row for all; what does not depend on the state is not computed in the loop.
        count = len(instants)
        all_weights = weights.expand(count, -1).unbind()
        all_sums = weights.sum(-1, keepdim=True).expand(count, -1).unbind()
        all_pulls = (weights * drive).expand(count, -1).unbind()
        controls = []
        for t, dw, c, w, w_sum, pull in zip(
            instants, noise.unbind(), contexts, all_weights, all_sums, all_pulls, strict=True
        ):
            u = None if control is None else control(x, y, t, c).to(x.dtype)
            drift = self.drift(x, t).to(x.dtype)
            shock = None
            if self.exact_ou:
                later = torch.addcmul(dw, y, decay)
                if u is not None:
                    later = torch.addcmul(later, u[..., None], drive)
                db = ((later - y) * w).sum(-1)
                if self.method == "milstein":
                    shock = (dw * w).sum(-1)
            else:
                push = dw if u is None else torch.add(dw, u, alpha=dt)
                later = torch.addcmul(push[..., None], y, decay)
                # Equal to the sum of w (later - y), without the difference of large numbers.
                db = torch.addcmul((y * pull).sum(-1), push, w_sum)
                if self.method == "milstein":
                    shock = dw * w_sum
            moved = torch.add(x, drift, alpha=dt)
            if isinstance(self.diffusion, nn.Module):
                x = moved + self._diffuse(x, t, db, shock)
            else:
                x = torch.add(moved, db, alpha=self.diffusion)
            y = later
            if u is not None:
                controls.append(u)
        kl = 0.5 * dt * torch.stack(controls).square().sum((0, 2)) if controls else x.new_zeros(len(x))
        return x, y, kl

    def _diffuse(self, x: Tensor, t: Tensor, db: Tensor, shock: Tensor | None) -> Tensor:
        diffusion = cast(nn.Module, self.diffusion)
        if shock is None:
            return diffusion(x, t).to(x.dtype) * db
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if keep and x.requires_grad else x.detach().requires_grad_()
            s = diffusion(x, t).to(x.dtype)
            # Entry d depends on entry d of x only, so the gradient of the sum is the diagonal of derivatives.
            slope = torch.zeros_like(x)
            if s.requires_grad:
                (slope,) = torch.autograd.grad(s.sum(), x, create_graph=keep, materialize_grads=True)
        if not keep:
            s, slope = s.detach(), slope.detach()
        return s * db + 0.5 * s * slope * shock.square()

    def _draw(
        self, dt: float, factor: Tensor | float, count: int, x: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Noise of ``count`` steps: of ``W``, or of ``Y`` where that is stepped exactly."""
        shape: tuple[int, ...] = (count, len(x), self.state_dim)
        if isinstance(factor, Tensor):
            shape = (*shape, len(factor))
        draws = torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator)
        return draws @ factor.T if isinstance(factor, Tensor) else draws * dt**0.5

    def _constants(self, steps: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What steps leave of ``Y``; and what a control of 1 adds to it (exact), or minus the speeds times the step."""
        speeds = self.noise.speeds
        times = speeds * steps.to(speeds)[:, None]
        if not self.exact_ou:
            return (1 - times).to(x), (-times).to(x)
        drive = torch.where(speeds > 0, -torch.expm1(-times) / speeds.clamp(min=1e-300), steps.to(speeds)[:, None])
        return torch.exp(-times).to(x), drive.to(x)

    def _check(self, x: Tensor, times: Tensor, counts: list[int], context: Tensor | None, y: Tensor | None) -> None:
        if x.ndim != 2 or x.shape[1] != self.state_dim:
            raise ValueError(f"x0 must have shape (batch, {self.state_dim}), got {tuple(x.shape)}")
        if not x.is_floating_point() or x.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"x0 must be float32 or float64, got {x.dtype}: networks may be narrower, states may not")
        memory = (len(x), self.state_dim, self.noise.num_ou)
        if y is not None and y.shape != memory:
            raise ValueError(f"y0 must have shape {memory}, got {tuple(y.shape)}")
        if context is not None and (
            context.ndim not in (2, 3) or len(context) != len(x) or context.shape[1:-1] not in ((), times.shape)
        ):
            raise ValueError(
                f"context must have shape ({len(x)}, features) or ({len(x)}, {len(times)}, features), got "
                f"{tuple(context.shape)}"
            )
        if sum(counts) > _MANY_STEPS:
            warnings.warn(f"dt asks for {sum(counts)} steps: is it too short for the times?", stacklevel=4)
        horizon = self.noise.time_horizon
        if self.noise.kind != "white" and len(times) > 1 and times[-1] - times[0] > horizon * (1 + 1e-6):
            warnings.warn(
                f"times span {times[-1] - times[0]:g}, but the noise's weights fit a time_horizon of {horizon:g}: "
                "set it to the longest path",
                stacklevel=4,
            )
        gaps = times.diff() / torch.tensor(counts) if counts else times.diff()
        fastest = self.noise.fastest
        if not self.exact_ou and counts and fastest * gaps.max() >= 0.5:
            raise ValueError(
                f"dt must be < {0.5 / fastest:g} for the largest speed {fastest:g}, got steps of {gaps.max():g}: "
                "choose a smaller dt, more substeps, or exact_ou=True"
            )


def _steps(times: Tensor, counts: list[int]) -> tuple[Tensor, list[float], list[int], list[float]]:
    """Starts of all steps and sizes by interval; for every step its interval and its place in it, in [0, 1)."""
    sizes, left, share = [], [], []
    for i, ((start, end), count) in enumerate(zip(pairwise(times.tolist()), counts, strict=True)):
        sizes.append((end - start) / count)
        left += [i] * count
        share += [n / count for n in range(count)]
    index, place = torch.tensor(left, dtype=torch.long), torch.tensor(share, dtype=times.dtype)
    starts = times[index] + place * times.diff()[index] if left else times[:0]
    return starts, sizes, left, share


def _interpolate(context: Tensor | None, left: list[int], share: list[float]) -> list[Tensor | None]:
    if context is None or context.ndim == 2:
        return [context] * len(left)
    index = torch.tensor(left, device=context.device)
    place = torch.tensor(share, device=context.device, dtype=context.dtype)[:, None, None]
    frames = context.transpose(0, 1)
    return list(torch.lerp(frames[index], frames[index + 1], place).unbind())
