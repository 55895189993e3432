"""Linear SDEs driven by Markov-approximated fractional noise are Gaussian: their exact covariance."""

import torch
from torch import Tensor

from lit_methods.fractional_noise import check_times
from lit_methods.vi.fractional_sde.networks import LinearDrift
from lit_methods.vi.fractional_sde.sde import FractionalSDE


def is_linear(sde: FractionalSDE) -> bool:
    """Whether :func:`linear_covariance` can be computed."""
    return (
        isinstance(sde.drift, LinearDrift) and not isinstance(sde.diffusion, torch.nn.Module) and not sde.noise.varies
    )


@torch.no_grad()
def linear_covariance(sde: FractionalSDE, times: Tensor) -> Tensor:
    """Exact covariance of one dimension of the prior's state, which starts from 0 at the first time, not at random.

    It is what a check of a learned posterior needs: Gaussian process regression with it gives the exact evidence and
    the exact posterior. By matrix exponentials of state and memory together (Van Loan 1978).

    Args:
        sde: with a :class:`LinearDrift` and a number as diffusion.
        times: increasing, ``(T,)``.

    Returns:
        Float64 ``(T, T)``.

    Raises:
        ValueError: an SDE that is not linear.
    """
    if not is_linear(sde):
        raise ValueError("sde must have a LinearDrift, a number as diffusion and one Hurst index to be solved exactly")
    assert isinstance(sde.drift, LinearDrift)
    grid, noise = check_times(times), sde.noise
    s = float(sde.diffusion)  # type: ignore[arg-type]
    w, speeds = noise.weights().cpu(), noise.speeds.cpu()
    size = len(w) + 1
    f = torch.zeros(size, size, dtype=torch.float64)
    f[0, 0], f[0, 1:] = -sde.drift.rate, -s * w * speeds
    f[1:, 1:] = -torch.diag(speeds)
    push = torch.cat([s * w.sum()[None], torch.ones_like(w)])
    block = torch.cat([torch.cat([-f, push[:, None] * push], 1), torch.cat([torch.zeros_like(f), f.T], 1)])
    state = torch.zeros_like(f)
    state[1:, 1:] = noise.initial_covariance().cpu()
    covariance = torch.zeros(len(grid), len(grid), dtype=torch.float64)
    for j in range(len(grid)):
        if j:
            power = torch.matrix_exp(block * (grid[j] - grid[j - 1]))
            move = power[size:, size:].T
            state = move @ power[:size, size:] + move @ state @ move.T
        column = state[:, 0]
        for i in range(j, len(grid)):
            if i > j:
                column = torch.matrix_exp(f * (grid[i] - grid[i - 1])) @ column
            covariance[i, j] = covariance[j, i] = column[0]
    return covariance
