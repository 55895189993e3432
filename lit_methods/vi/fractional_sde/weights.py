r"""The weights that make a bank of Ornstein-Uhlenbeck processes follow fractional Brownian motion.

They minimise :math:`\int_0^T E[(\sum_k w_k Y_k - B)^2] dt`, so they solve ``A w = b`` (Daems et al., appendix). On the
horizon ``T`` they are ``T^(H - 1/2)`` times those of speeds ``gamma T`` on the horizon 1, so only that is needed.
"""

import math

import numpy as np
import torch
from scipy.special import gamma as gamma_function
from scipy.special import gammainc, gammaincc
from torch import Tensor, nn

from lit_methods.fractional_noise import Kind

NODES = 24


def ou_speeds(num_ou: int, gamma_max: float = 20.0, gamma_min: float | None = None) -> Tensor:
    """Speeds of mean reversion on a geometric grid.

    Args:
        num_ou: number of processes, >= 1; one alone gets the geometric mean of both ends.
        gamma_max: the largest speed, > 0; above 1 unless ``gamma_min`` is given.
        gamma_min: the smallest, in (0, gamma_max); ``None``: ``1 / gamma_max``.

    Returns:
        Increasing speeds in float64, ``(num_ou,)``.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> ou_speeds(3, 20.0)
        tensor([ 0.0500,  1.0000, 20.0000], dtype=torch.float64)
    """
    if num_ou < 1:
        raise ValueError(f"num_ou must be >= 1, got {num_ou}")
    if not 0 < gamma_max < math.inf:
        raise ValueError(f"gamma_max must be > 0 and finite, got {gamma_max}")
    if gamma_min is None:
        if gamma_max <= 1:
            raise ValueError(f"gamma_max must be > 1 where gamma_min is not given, got {gamma_max}")
        gamma_min = 1 / gamma_max
    if not 0 < gamma_min < gamma_max:
        raise ValueError(f"gamma_min must be in (0, {gamma_max:g}), got {gamma_min}")
    middle, ratio = (gamma_min * gamma_max) ** 0.5, (gamma_max / gamma_min) ** 0.5
    steps = torch.linspace(-1, 1, num_ou, dtype=torch.float64) if num_ou > 1 else torch.zeros(1, dtype=torch.float64)
    return middle * ratio**steps


def check_speeds(gamma: Tensor) -> Tensor:
    """Speeds in float64.

    Raises:
        ValueError: they are not positive, finite and increasing, ``(K,)``.
    """
    gamma = torch.as_tensor(gamma, dtype=torch.float64)
    if gamma.ndim != 1 or not len(gamma) or not bool((gamma > 0).all() & gamma.isfinite().all()):
        raise ValueError(f"speeds must be positive and finite, got {gamma.tolist()}")
    if not bool((gamma.diff() > 0).all()):
        raise ValueError(f"speeds must increase strictly, got {gamma.tolist()}")
    return gamma


def normal_matrix(z: Tensor, kind: Kind) -> Tensor:
    """``A`` on the horizon 1, of speeds ``z`` ``(K,)``."""
    sums = z[:, None] + z
    if kind == "I":
        short = 1 + torch.expm1(-z) / z
        return (short[:, None] + short) / sums
    return (1 + torch.expm1(-sums) / sums) / sums


def right_side(z: np.ndarray, hurst: np.ndarray, kind: Kind) -> np.ndarray:
    """``b`` times ``z^(H + 1/2)`` on the horizon 1, which is smooth in H; both arguments broadcast."""
    a = hurst + 0.5
    if kind == "I":
        return 2 - z ** (a - 1) / gamma_function(a + 1) + (np.exp(-z) - scaled_gammaincc(a, z)) / z
    return gammainc(a, z) - a / z * gammainc(a + 1, z)


def scaled_gammaincc(a: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``Q(a, z) exp(z)`` without overflow: by a continued fraction from z = 10 on."""
    a, z = np.broadcast_arrays(np.asarray(a, float), np.asarray(z, float))
    small = np.minimum(z, 10.0)
    fraction = np.zeros_like(z)
    for n in range(60, 0, -1):  # Lentz's fraction for Gamma(a, z) e^z / z^a, from its tail
        fraction = n * (a - n) / (z + 2 * n + 1 - a + fraction)
    large = z**a / gamma_function(a) / (z + 1 - a + fraction)
    return np.where(z < 10, gammaincc(a, small) * np.exp(small), large)


class OptimalWeights(nn.Module):
    """H to optimal weights, differentiable: ``b`` is interpolated between Chebyshev nodes of H in (0, 1).

    torch has no derivative of the incomplete gamma function in its first argument, where H enters; speeds and horizon
    are constants, so that scipy does that part once. Everything is in float64 whatever the module is converted to.

    Args:
        gamma: increasing speeds, ``(K,)``.
        time_horizon: the horizon ``T`` of the fit, > 0.
        kind: "I" or "II".
        normalize: for the process that has variance 1 at time 1.
    """

    def __init__(self, gamma: Tensor, time_horizon: float, kind: Kind, normalize: bool) -> None:
        super().__init__()
        z = check_speeds(gamma) * time_horizon
        matrix = normal_matrix(z, kind)
        if z[0] < 1e-4 or torch.linalg.cond(matrix) > 1e14:
            raise ValueError(
                f"gamma_min must suit the horizon, got speeds from {gamma[0]:.3g} to {gamma[-1]:.3g} with "
                f"time_horizon={time_horizon:g}, which float64 cannot tell apart: take gamma_min near "
                f"{0.05 / time_horizon:.3g}, gamma_max near {20 / time_horizon:.3g}, or fewer of them"
            )
        nodes = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES)
        values = torch.from_numpy(right_side(z.numpy(), nodes.numpy()[:, None], kind))
        orders = torch.arange(NODES, dtype=torch.float64)
        basis = torch.cos(orders * torch.arccos((2 * nodes - 1).clamp(-1, 1))[:, None])
        # A conversion of the module must not round these tables: they are kept out of its buffers.
        self._tables = {"matrix": matrix, "coefficients": torch.linalg.solve(basis, values)}
        self._tables["log_z"] = z.log()
        self.time_horizon, self.kind, self.normalize = time_horizon, kind, normalize

    def forward(self, hurst: Tensor) -> Tensor:
        """Weights ``(..., K)`` in float64 of Hurst indices ``(...)`` in (0, 1)."""
        if self._tables["matrix"].device != hurst.device:
            self._tables = {name: table.to(hurst.device) for name, table in self._tables.items()}
        matrix, coefficients, log_z = (self._tables[name] for name in ("matrix", "coefficients", "log_z"))
        with torch.autocast(hurst.device.type, enabled=False):
            hurst = hurst.to(torch.float64)[..., None]
            b = _chebyshev(2 * hurst - 1, coefficients) * torch.exp(-(hurst + 0.5) * log_z)
            weights = torch.linalg.solve(matrix, b[..., None])[..., 0]
            scale = (hurst - 0.5) * math.log(self.time_horizon)
            if self.normalize:
                scale = scale + 0.5 * self.log_normalizer(hurst)
            return weights * scale.exp()

    def log_normalizer(self, hurst: Tensor) -> Tensor:
        """Minus the logarithm of the process's variance at time 1."""
        if self.kind == "I":
            return torch.lgamma(2 * hurst + 1) + torch.log(torch.sin(math.pi * hurst))
        return torch.log(2 * hurst) + 2 * torch.lgamma(hurst + 0.5)


def _chebyshev(x: Tensor, coefficients: Tensor) -> Tensor:
    """Clenshaw's sum of ``coefficients`` ``(n, K)`` at ``x`` ``(..., 1)``."""
    later, latest = torch.zeros_like(x), torch.zeros_like(x)
    for row in coefficients[1:].flip(0):
        later, latest = row + 2 * x * later - latest, later
    return coefficients[0] + x * later - latest
