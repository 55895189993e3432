import numpy as np
import pytest
import torch
from torch import nn

from lit_methods.optim import Ball, OptimisticEnsemble, OptimisticOMD
from tests.unit.optim.optimistic.online import ball, draws, play

T, D = 400, 3


def sword(gradient, etas, rounds, dim, radius, diameter, smoothness, greedy=True):
    """Collaborative Sword++ in NumPy, line by line from the description of PyNOL's loop; shares no code with ours."""
    n = len(etas)
    center, before = np.zeros((n, dim)), None
    prior, past, surprise = np.full(n, 1 / n), np.zeros(n), 0.0
    guess, points, weights = np.zeros(dim), [], []
    eps = 1 / (8 * diameter**2 * smoothness)
    for t in range(rounds):
        x = np.stack([ball(center[i] - etas[i] * guess, radius) for i in range(n)])
        moved = np.zeros(n) if before is None else 2 * smoothness * ((x - before) ** 2).sum(1)
        expected = x @ guess + moved
        p = prior * np.exp(-eps * expected) if greedy else np.exp(-eps * (past + expected))
        p = p / p.sum()
        point = p @ x
        points.append(point)
        weights.append(p)
        g = gradient(t, point)
        loss = x @ g + moved
        prior = prior * np.exp(-eps * loss)
        prior, past = prior / prior.sum(), past + loss
        surprise += np.abs(loss - expected).max() ** 2
        eps = min(1 / (8 * diameter**2 * smoothness), (1 + surprise) ** -0.5)
        center = np.stack([ball(center[i] - etas[i] * g, radius) for i in range(n)])
        before, guess = x, g
    return np.stack(points), np.stack(weights)


def drifting(dtype):
    angles = torch.arange(T, dtype=torch.float64) / 60
    targets = torch.stack([angles.cos(), angles.sin(), 0 * angles], 1) + 0.1 * draws(T, D)
    convert = targets.numpy() if dtype is np.ndarray else targets
    return lambda t, x: 4 * (x - convert[t])


@pytest.mark.parametrize("meta", ["greedy", "lazy"])
def test_trajectory_is_that_of_the_official_algorithm(meta):
    pool = OptimisticEnsemble.step_pool(2.0, 2.0, 1.0, T)
    expected, weights = sword(drifting(np.ndarray), pool, T, D, 1.0, 2.0, 1.0, greedy=meta == "greedy")
    points, optimizer = play(
        lambda ps: OptimisticEnsemble(ps, diameter=2.0, grad_bound=2.0, horizon=T, constraint=Ball(1.0), meta=meta),
        torch.zeros(D, dtype=torch.float64),
        drifting(torch.Tensor),
        T - 1,
    )
    np.testing.assert_allclose(points.numpy(), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(optimizer.weights[0].numpy(), weights[-1], rtol=0, atol=1e-10)
    assert float(points.norm(dim=1).max()) <= 1 + 1e-12, "convex combinations stay inside"
    assert float(optimizer.weights[0].sum()) == pytest.approx(1)
    assert optimizer.weights[0].max() > 0.34, "the weights moved"


def test_step_pool():
    assert OptimisticEnsemble.step_pool(2.0, 2.0, 1.0, 400) == pytest.approx([0.05, 0.1, 0.2])
    assert len(OptimisticEnsemble.step_pool(2.0, 2.0, 1.0, 20000)) == 6
    assert OptimisticEnsemble.step_pool(1.0, 1.0, 1.0, 4) == [0.5]


def test_one_learner_is_optimistic_gradient_descent():
    g, start = draws(50, D), torch.zeros(D, dtype=torch.float64)
    one, _ = play(lambda ps: OptimisticEnsemble(ps, step_sizes=[0.1], constraint=Ball(0.6)), start, g)
    omd, _ = play(
        lambda ps: OptimisticOMD(ps, 0.1, step_size="constant", constraint=Ball(0.6)), torch.zeros(D).double(), g
    )
    torch.testing.assert_close(one, omd, rtol=0, atol=1e-13)


def test_parameters_of_a_group_are_one_point():
    gradient = drifting(torch.Tensor)
    whole, _ = play(
        lambda ps: OptimisticEnsemble(ps, constraint=Ball(0.5)), torch.zeros(D, dtype=torch.float64), gradient, 50
    )
    parts = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((), (2, 1))]
    optimizer = OptimisticEnsemble(parts, constraint=Ball(0.5))
    for t in range(50):
        grad = gradient(t, torch.cat([p.detach().flatten() for p in parts]))
        parts[0].grad, parts[1].grad = grad[0].clone(), grad[1:, None].clone()
        optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in parts]), whole[-1], rtol=0, atol=1e-12)


def test_huge_losses_keep_weights_finite():
    points, optimizer = play(OptimisticEnsemble, torch.zeros(D), lambda t, x: torch.full((D,), 1e6 * (-1.0) ** t), 20)
    assert points.isfinite().all()
    assert float(optimizer.weights[0].sum()) == pytest.approx(1)


def test_own_projection_is_applied_to_every_learner():
    points, optimizer = play(
        lambda ps: OptimisticEnsemble(ps, step_sizes=[0.1, 1.0], constraint=lambda x: x.clamp(-0.1, 0.1)),
        torch.zeros(D),
        draws(20, D),
    )
    (state,) = optimizer.state.values()
    assert float(state["points"].abs().max()) <= 0.1 + 1e-7
    assert float(points.abs().max()) <= 0.1 + 1e-7
