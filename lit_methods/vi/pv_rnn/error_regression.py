"""Recognition without an encoder: past errors move the adaptive vectors of the last steps."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_methods.diffusion.streams import stream
from lit_methods.vi.pv_rnn.network import PVRNN, PVRNNOutput
from lit_methods.vi.pv_rnn.objective import as_meta_prior, step_losses, without_gaps


class Window(NamedTuple):
    """The last steps of all streams.

    Attributes:
        values: observations ``(streams, steps, numbers)``.
        mask: which there were, ``(streams, steps)``.
        adaptive: adaptive vectors ``(streams, steps, 2 units)``.
        start: the state before the window, ``(streams, D)``; ``None`` if it begins with the first observation.
        updates: how often it was fitted.
    """

    values: Tensor
    mask: Tensor
    adaptive: Tensor
    start: Tensor | None
    updates: int


class WindowLoss(NamedTuple):
    """Loss of each stream's window with ``z = mu``, ``(streams,)``, before and after an update."""

    before: Tensor
    after: Tensor


class ErrorRegression:
    """Follows streams of observations with a trained network, and predicts how they go on.

    After each observation the adaptive vectors of the last ``window`` steps are fitted anew by ``iterations`` steps of
    Adam on the training loss; the weights stay as they are, bit by bit, and keep their flags and gradients. A step that
    leaves the window is kept as the state (with ``z = mu``) from which the window begins. Streams are independent: a
    batch of them gives what each would give alone. It works in ``Trainer.validate`` and under ``torch.no_grad`` or
    ``torch.inference_mode`` as well.

    Example:
        >>> filter = ErrorRegression(network, window=8, meta_prior=0.01)
        >>> for x in observations:  # (streams, numbers)
        ...     filter.update(x)
        >>> future = filter.predict(horizon=16)  # (1, streams, 16, numbers)

    Args:
        network: the trained network.
        window: steps that are fitted, >= 1.
        iterations: steps of Adam for each observation, >= 0.
        lr: its step size, > 0.
        meta_prior: weights of the KL terms, as in training.
        initial_meta_prior: that of a sequence's first step; ``None``: as ``meta_prior``.
        restarts: starts of each fit, >= 1: the adaptive vectors as they are, and ``restarts - 1`` with standard normal
            noise added; each stream keeps the best.
        deterministic: no noise: ``z = mu``.
        seed: of the noise, >= 0. Each stream has noise of its own, whatever the number of streams.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        network: PVRNN,
        window: int = 10,
        iterations: int = 50,
        lr: float = 0.09,
        *,
        meta_prior: float | list[float] = 0.01,
        initial_meta_prior: float | list[float] | None = None,
        restarts: int = 1,
        deterministic: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("window", window, 1),
            ("iterations", iterations, 0),
            ("restarts", restarts, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if not 0 < lr < float("inf"):
            raise ValueError(f"lr must be > 0 and finite, got {lr}")
        self.network = network
        self.window, self.iterations, self.lr = window, iterations, lr
        self.weights = as_meta_prior(meta_prior, initial_meta_prior, len(network.latent_sizes))
        self.restarts, self.deterministic, self.seed = restarts, deterministic, seed
        self.recent: Window | None = None

    def begin(self, values: Tensor, mask: Tensor | None = None) -> WindowLoss:
        """Forget everything and fit a first window at once.

        Args:
            values: observations ``(streams, steps, numbers)``, at most ``window`` steps.
            mask: which were observed, bool ``(streams, steps)``; ``None``: all.

        Raises:
            ValueError: a wrong shape, or observed values that are not finite.
        """
        streams, steps = values.shape[:2]
        if not 1 <= steps <= self.window:
            raise ValueError(f"values must have from 1 to window={self.window} steps, got {steps}")
        with torch.inference_mode(False):
            values, mask = self._checked(values, mask)
            return self._fit(Window(values, mask, self.network.adaptive_like_prior(steps, streams), None, 0))

    def update(self, x: Tensor, mask: Tensor | None = None) -> WindowLoss:
        """Take the next observation of every stream, and fit the window.

        Args:
            x: ``(streams, numbers)``.
            mask: whether each was observed, bool ``(streams,)``; ``None``: all were. Without an observation the window
                moves on all the same.

        Returns:
            The window's loss before and after.

        Raises:
            ValueError: a wrong shape, or observed values that are not finite.
        """
        new_values, new_mask = x[:, None], None if mask is None else mask[:, None]
        old = self.recent
        if old is None:
            return self.begin(new_values, new_mask)
        if x.shape != old.values[:, 0].shape:
            raise ValueError(f"x must be {tuple(old.values[:, 0].shape)}, got {tuple(x.shape)}")
        with torch.inference_mode(False), torch.no_grad():
            new_values, new_mask = self._checked(new_values, new_mask)
            states = self._run(old, old.adaptive).states
            new = self.network.adaptive_like_prior(1, len(x), states[:, -1])
            leaves = int(old.values.shape[1] == self.window)
            return self._fit(
                Window(
                    torch.cat([old.values[:, leaves:], new_values], 1),
                    torch.cat([old.mask[:, leaves:], new_mask], 1),
                    torch.cat([old.adaptive[:, leaves:], new], 1),
                    states[:, 0] if leaves else old.start,
                    old.updates,
                )
            )

    @torch.no_grad()
    def predict(self, horizon: int, num_samples: int = 1) -> Tensor:
        """How the streams go on: ``(num_samples, streams, horizon, numbers)``.

        The window is run by the posterior, what follows by the prior. It changes nothing: ask as often as you like.

        Raises:
            RuntimeError: there was no observation yet.
        """
        if self.recent is None:
            raise RuntimeError("ErrorRegression.predict needs an observation: call begin or update first")
        values, _, adaptive, start, updates = self.recent
        streams, steps = values.shape[:2]
        noise = [self._noise(streams, steps + horizon, "predict", updates, sample) for sample in range(num_samples)]
        run = self.network.generate(
            steps + horizon,
            num_samples * streams,
            None if start is None else start.repeat(num_samples, 1),
            initial_adaptive=adaptive.repeat(num_samples, 1, 1),
            eps=torch.cat(noise, 1),
        )
        return run.mean[:, steps:].unflatten(0, (num_samples, streams))

    def state_dict(self) -> dict[str, Any]:
        """The window, the state before it and the number of updates: what goes on where it stopped."""
        return {} if self.recent is None else self.recent._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved state.

        Raises:
            ValueError: it has other names, or a window longer than this one's.
        """
        if not state_dict:
            self.recent = None
            return
        if set(state_dict) != set(Window._fields):
            raise ValueError(f"state_dict must hold {', '.join(Window._fields)}, got {', '.join(sorted(state_dict))}")
        if state_dict["values"].shape[1] > self.window:
            raise ValueError(f"window must be >= {state_dict['values'].shape[1]} as in the state, got {self.window}")
        copies: dict[str, Any] = {name: x.clone() if isinstance(x, Tensor) else x for name, x in state_dict.items()}
        self.recent = Window(**copies)

    def _fit(self, window: Window) -> WindowLoss:
        streams, steps = window.values.shape[:2]
        with torch.no_grad():
            before = self._loss(window, window.adaptive)
        starts = [window.adaptive]
        for copy in range(1, self.restarts):
            noise = self._noise(streams, 2 * steps, "restart", window.updates, copy)
            starts.append(window.adaptive + noise.unflatten(0, (steps, 2)).permute(2, 0, 1, 3).flatten(2))
        adaptive = torch.cat(starts).detach().clone().requires_grad_()
        draws = [self._noise(streams, steps * self.iterations, "fit", window.updates, c) for c in range(self.restarts)]
        optimizer = torch.optim.Adam([adaptive], lr=self.lr)
        for eps in torch.cat(draws, 1).split(steps) if self.iterations else ():
            with torch.enable_grad():
                loss = self._loss(window, adaptive, eps).sum()
            (adaptive.grad,) = torch.autograd.grad(loss, adaptive)
            optimizer.step()
        found = adaptive.detach()
        with torch.no_grad():
            after, best = self._loss(window, found).view(self.restarts, streams).min(0)
        chosen = found.unflatten(0, (self.restarts, streams))[best, torch.arange(streams, device=best.device)]
        self.recent = window._replace(adaptive=chosen, updates=window.updates + 1)
        if self.iterations and not after.sum() <= before.sum():
            warnings.warn(
                f"the window's loss did not fall: {float(before.mean()):.4g} before and {float(after.mean()):.4g} "
                f"after {self.iterations} iterations; lower lr={self.lr:g}, or allow more iterations or restarts"
            )
        return WindowLoss(before, after)

    def _run(self, window: Window, adaptive: Tensor, eps: Tensor | None = None) -> PVRNNOutput:
        start = None if window.start is None else window.start.repeat(len(adaptive) // len(window.start), 1)
        return self.network.posterior(adaptive, start, eps=eps, deterministic=eps is None, frozen=True)

    def _loss(self, window: Window, adaptive: Tensor, eps: Tensor | None = None) -> Tensor:
        """Of each stream and copy of it."""
        copies = len(adaptive) // len(window.values)
        values, mask = window.values.repeat(copies, 1, 1), window.mask.repeat(copies, 1)
        output = self._run(window, adaptive, eps)
        return step_losses(self.network, output, values, mask, self.weights, first=window.start is None).total()

    def _checked(self, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if values.shape[-1] != self.network.output_size:
            raise ValueError(f"observations must have {self.network.output_size} numbers, got {values.shape[-1]}")
        device = self.network.weight.device
        return without_gaps(values.clone().to(device), None if mask is None else mask.clone().to(device))

    def _noise(self, streams: int, steps: int, purpose: str, updates: int, copy: int) -> Tensor:
        """Standard normal numbers ``(steps, streams, units)``, of each stream's own."""
        weight, units = self.network.weight, sum(self.network.latent_sizes)
        dtype = torch.promote_types(torch.float32, weight.dtype)
        if self.deterministic and purpose != "restart":
            return torch.zeros(steps, streams, units, dtype=dtype, device=weight.device)
        sources = [stream(weight.device, self.seed, purpose, i, copy, updates) for i in range(streams)]
        draws = [torch.randn(steps, units, generator=s, dtype=dtype, device=weight.device) for s in sources]
        return torch.stack(draws, 1)
