import numpy as np
import pytest
import torch

from lit_methods.optim import Ball, OptimisticFTL, OptimisticFTRL
from tests.unit.optim.optimistic.online import ball, draws, play

T, D = 40, 4


@pytest.mark.parametrize("radius", [None, 0.5])
@pytest.mark.parametrize("optimistic", [True, False])
def test_ftrl_minimises_its_objective(radius, optimistic):
    """x_t = argmin <sum g + M, x> + |x|^2 / eta_t, by its closed form on a ball, from the card's recursion for eta."""
    g = draws(T, D)
    nu = OptimisticFTRL.theory_nu(2.0, 3.0, 1.0)
    assert nu == 10
    points, _ = play(
        lambda ps: OptimisticFTRL(
            ps,
            2.0,
            nu,
            constraint=radius and Ball(radius),
            optimism="last_gradient" if optimistic else "none",
        ),
        torch.zeros(D, dtype=torch.float64),
        g,
    )
    guess, weighted = np.zeros(D), 0.0
    for t, grad in enumerate(g.numpy(), 1):
        weighted += 4.0 / (nu + weighted) * ((grad - guess) ** 2).sum()
        guess = grad if optimistic else 0 * grad
        eta = 4.0 / (nu + weighted)
        expected = ball(-eta / 2 * (g[:t].sum(0).numpy() + guess), radius or np.inf)
        np.testing.assert_allclose(points[t].numpy(), expected, rtol=0, atol=1e-12)


def test_ftrl_regularises_around_its_start():
    g = draws(T, D)
    from_zero, _ = play(lambda ps: OptimisticFTRL(ps, 2.0), torch.zeros(D).double(), g)
    from_one, _ = play(lambda ps: OptimisticFTRL(ps, 2.0), torch.ones(D).double(), g)
    torch.testing.assert_close(from_one, from_zero + 1, rtol=0, atol=1e-12)


def test_ftrl_keeps_its_worst_case_bound():
    """3 sqrt(2) D G sqrt(T) + 4 D G against signs drawn at random, D = 2, G = 1, on the unit ball."""
    rounds, nu = 2000, OptimisticFTRL.theory_nu(2.0, 1.0)
    signs = draws(rounds, 1).sign()
    points, _ = play(lambda ps: OptimisticFTRL(ps, 2.0, nu, constraint=Ball(1.0)), torch.zeros(1).double(), signs)
    regret = float((signs * points[:-1]).sum() + signs.sum().abs())
    assert 0 < regret < 3 * 2**0.5 * 2 * rounds**0.5 + 8


@pytest.mark.parametrize("radius", [None, 0.5])
@pytest.mark.parametrize("optimistic", [True, False])
def test_ftl_minimises_its_objective(radius, optimistic):
    """Gradient of sum [<g_s, x> + mu/2 |x - x_s|^2] + <M, x> at x_t is zero; on the ball it is a projection."""
    g, mu = draws(T, D), 0.7
    points, _ = play(
        lambda ps: OptimisticFTL(
            ps,
            strong_convexity=mu,
            constraint=radius and Ball(radius),
            optimism="last_gradient" if optimistic else "none",
        ),
        torch.zeros(D, dtype=torch.float64),
        g,
    )
    x = points.numpy()
    for t in range(1, T + 1):
        guess = g[t - 1].numpy() if optimistic else np.zeros(D)
        free = (x[:t].sum(0) - (g[:t].sum(0).numpy() + guess) / mu) / t
        np.testing.assert_allclose(x[t], ball(free, radius or np.inf), rtol=0, atol=1e-12)


def test_ftl_without_optimism_averages_quadratics():
    """On |x - z|^2 / 2 with mu = 1, following the leader plays the mean of the z seen."""
    z = draws(T, D)
    points, _ = play(lambda ps: OptimisticFTL(ps, optimism="none"), torch.zeros(D).double(), lambda t, x: x - z[t], T)
    means = z.cumsum(0) / torch.arange(1, T + 1)[:, None]
    torch.testing.assert_close(points[1:], means, rtol=0, atol=1e-12)


def test_user_hint():
    g = draws(T + 1, D)
    clock = iter(range(1, T + 1))
    points, _ = play(lambda ps: OptimisticFTL(ps, optimism=lambda p: g[next(clock)]), torch.zeros(D).double(), g[:T])
    torch.testing.assert_close(points[1], -(g[0] + g[1]))
    with pytest.raises(ValueError, match="smoothness must be > 0"):
        OptimisticFTRL.theory_nu(1.0, 1.0, 0.0)
