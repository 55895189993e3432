"""Points from a mixture of Gaussians on a circle, of which everything is known."""

import math

import torch
from torch import Tensor

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules.tensors import TensorDataModule, check_int


class Mixture2DDataModule(TensorDataModule):
    """``modes`` equal Gaussians in the plane, evenly on a circle around the origin.

    Batches are :class:`~lit_methods.batches.SupervisedBatch`: ``x`` float32 ``(batch, 2)``, ``y`` int64 ``(batch,)``,
    the mode. Nothing is fetched.

    The data are known after any amount of noise: for ``x = alpha x_0 + sigma eps`` there are :meth:`log_prob`,
    :meth:`score`, :meth:`posterior_mean` of ``x_0`` and :meth:`velocity` of the probability-flow ODE, exact, and
    :meth:`flow_map`, its solution to a given accuracy.

    Args:
        modes: number of Gaussians, >= 1.
        radius: distance of their centres from the origin, >= 0.
        std: their standard deviation, > 0.
        train_size: training points, >= 1.
        val_size: validation points, >= 0.
        test_size: test points, >= 0.
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: of the points and of their order, >= 0.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        modes: int = 8,
        radius: float = 1.0,
        std: float = 0.1,
        train_size: int = 8192,
        val_size: int = 1024,
        test_size: int = 2048,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.num_classes = check_int("modes", modes, 1)
        if not 0 <= radius < math.inf:
            raise ValueError(f"Invalid radius={radius!r}: must be >= 0 and finite.")
        if not 0 < std < math.inf:
            raise ValueError(f"Invalid std={std!r}: must be > 0 and finite.")
        self.radius = radius
        self.std = std
        self.sizes = [
            check_int("train_size", train_size, 1),
            check_int("val_size", val_size, 0),
            check_int("test_size", test_size, 0),
        ]

    @property
    def centres(self) -> Tensor:
        """Centres of the modes, float64 ``(modes, 2)``."""
        angles = torch.arange(self.num_classes, dtype=torch.float64) * (2 * math.pi / self.num_classes)
        return self.radius * torch.stack([angles.cos(), angles.sin()], 1)

    def setup(self, stage: str) -> None:
        """Draw the points."""
        generator = torch.Generator().manual_seed(self.seed)
        y = torch.randint(self.num_classes, (sum(self.sizes),), generator=generator)
        x = self.centres[y].float() + self.std * torch.randn(len(y), 2, generator=generator)
        splits = zip(x.split(self.sizes), y.split(self.sizes), strict=True)
        self.train_data, self.val_data, self.test_data = (SupervisedBatch(*rows) for rows in splits)

    def log_prob(self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        """Log-density of ``alpha x_0 + sigma eps`` at points ``(batch, 2)``; numbers or ``(batch,)``."""
        logits, variance, _ = self._modes(x, alpha, sigma)
        return logits.logsumexp(1) - math.log(self.num_classes) - (2 * math.pi * variance[:, 0]).log()

    def posterior_mean(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Expected ``x_0`` at ``x = alpha x_0 + sigma eps``."""
        logits, variance, centres = self._modes(x, alpha, sigma)
        alpha = _column(alpha, x)
        centre = logits.softmax(1) @ centres
        return centre + alpha * self.std**2 / variance * (x - alpha * centre)

    def score(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Gradient of :meth:`log_prob`."""
        logits, variance, centres = self._modes(x, alpha, sigma)
        return (_column(alpha, x) * (logits.softmax(1) @ centres) - x) / variance

    def velocity(
        self,
        x: Tensor,
        alpha: Tensor | float,
        sigma: Tensor | float,
        d_alpha: Tensor | float,
        d_sigma: Tensor | float,
    ) -> Tensor:
        """``alpha' E[x_0 | x] + sigma' E[eps | x]``, with the derivatives of ``alpha`` and ``sigma`` in time."""
        clean, noise = self.posterior_mean(x, alpha, sigma), -_column(sigma, x) * self.score(x, alpha, sigma)
        return _column(d_alpha, x) * clean + _column(d_sigma, x) * noise

    def flow_map(self, x: Tensor, t: float, s: float, steps: int = 200) -> Tensor:
        """Where the flow of straight lines, ``alpha = 1 - t`` and ``sigma = t``, carries points from ``t`` to ``s``.

        By ``steps`` Runge-Kutta steps of order 4; in float64 the default is exact to about 1e-7.
        """
        h = (s - t) / steps
        for i in range(steps):
            u = t + i * h
            k1 = self._straight(x, u)
            k2 = self._straight(x + 0.5 * h * k1, u + 0.5 * h)
            k3 = self._straight(x + 0.5 * h * k2, u + 0.5 * h)
            k4 = self._straight(x + h * k3, u + h)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def _straight(self, x: Tensor, t: float) -> Tensor:
        return self.velocity(x, 1 - t, t, -1.0, 1.0)

    def _modes(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights of the modes up to the same number in each row, their variance, and their centres."""
        centres, alpha, sigma = self.centres.to(x), _column(alpha, x), _column(sigma, x)
        variance = (alpha * self.std) ** 2 + sigma**2
        squares = (x[:, None] - alpha[..., None] * centres).square().sum(2)
        return -0.5 * squares / variance, variance, centres


def _column(value: Tensor | float, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(len(x))[:, None]
