import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from lit_methods.optim import Ball, Box, L1Ball, Simplex
from lit_methods.optim.constraints import project_l1_ball, project_simplex, weighted_ball_multiplier
from lit_methods.optim.optimistic.newton import project_matrix_ball

SETS = {
    "box": Box(-0.5, 0.3),
    "ball": Ball(0.7),
    "ball_p": Ball(0.7, norm=1.5),
    "simplex": Simplex(),
    "simplex_total": Simplex(total=2.5),
    "simplex_columns": Simplex(dim=-2),
    "l1": L1Ball(0.8),
    "l1_columns": L1Ball(0.8, dim=-2),
}
EUCLIDEAN = [name for name in SETS if name != "ball_p"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", SETS)
def test_idempotent_and_batched(name):
    (once,) = SETS[name]([draw(4, 6)])
    (twice,) = SETS[name]([once])
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-12)
    (batch,) = SETS[name]([torch.stack([draw(4, 6), draw(4, 6, seed=1)])], leading=1)
    torch.testing.assert_close(batch[0], once, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", EUCLIDEAN)
def test_non_expansive_and_a_projection(name):
    """||Px - Py|| <= ||x - y||, and <x - Px, z - Px> <= 0 for every z in the set."""
    for seed in range(20):
        x, y = draw(4, 6, seed=seed), 2 * draw(4, 6, seed=100 + seed)
        px, py = (SETS[name]([z])[0] for z in (x, y))
        assert (px - py).norm() <= (x - y).norm() + 1e-12
        assert ((x - px) * (py - px)).sum() <= 1e-12


@pytest.mark.parametrize("total", [1.0, 0.3])
def test_simplex_satisfies_its_optimality_conditions(total):
    x = draw(50, 7)
    u = project_simplex(x, total=total)
    torch.testing.assert_close(u.sum(-1), torch.full((50,), total, dtype=torch.float64))
    shift = torch.where(u > 0, x - u, -torch.inf).amax(-1, keepdim=True)  # the multiplier of the sum
    torch.testing.assert_close(u, (x - shift).clamp(min=0), rtol=0, atol=1e-12)


def test_l1_ball_keeps_inner_points_and_soft_thresholds_others():
    x = draw(50, 7)
    x[0] *= 0.01
    u = project_l1_ball(x, 0.8)
    assert torch.equal(u[0], x[0])
    torch.testing.assert_close(u[1:].abs().sum(-1), torch.full((49,), 0.8, dtype=torch.float64))
    shift = torch.where(u != 0, (x - u).abs(), -torch.inf).amax(-1, keepdim=True)
    torch.testing.assert_close(u[1:], (x.sign() * (x.abs() - shift).clamp(min=0))[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["simplex", "l1"])
def test_scipy_finds_no_better_point(name):
    x = draw(5).numpy()
    u = SETS[name]([torch.from_numpy(x)])[0].numpy()
    constraint = (
        {"type": "eq", "fun": lambda v: v.sum() - 1}
        if name == "simplex"
        else {"type": "ineq", "fun": lambda v: 0.8 - np.abs(v).sum()}
    )
    bounds = [(0, None)] * 5 if name == "simplex" else None
    best = minimize(lambda v: ((v - x) ** 2).sum(), np.full(5, 0.1), bounds=bounds, constraints=[constraint], tol=1e-14)
    assert ((u - x) ** 2).sum() <= best.fun + 1e-7
    np.testing.assert_allclose(u, best.x, atol=1e-4)


def test_weighted_ball_satisfies_its_optimality_conditions():
    w, y = draw(30, 6).exp(), 3 * draw(30, 6, seed=1)
    y[0] *= 0.01
    nu = weighted_ball_multiplier(w, y, 1.0)
    x = w * y / (w + nu[:, None])
    assert nu[0] == 0
    assert (nu[1:] > 0).all()
    torch.testing.assert_close(x[1:].norm(dim=-1), torch.ones(29, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(w * (x - y) + nu[:, None] * x, torch.zeros_like(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("spread", [1.0, 1e8])
def test_matrix_ball_satisfies_its_optimality_conditions(spread):
    basis = torch.linalg.qr(draw(6, 6)).Q
    matrix = basis @ torch.diag(torch.logspace(0, float(np.log10(spread)), 6, dtype=torch.float64)) @ basis.T
    y = 3 * draw(6, seed=2)
    x = project_matrix_ball(y, matrix, 1.0)
    assert float(x.norm()) == pytest.approx(1, abs=1e-9)
    force = matrix @ (y - x)
    assert float(force @ x) > 0
    torch.testing.assert_close(force / force.norm(), x, rtol=0, atol=1e-7)


def test_one_ball_for_a_group_or_for_each_tensor():
    xs = [torch.full((3,), 2.0), torch.full((2, 2), 2.0)]
    together = Ball(1.0)(xs)
    assert float(sum(x.square().sum() for x in together)) == pytest.approx(1)
    apart = Ball(1.0, per_tensor=True)(xs)
    assert [float(x.norm()) for x in apart] == pytest.approx([1, 1])
    torch.testing.assert_close(Ball(1.0)(xs, weights=[torch.ones_like(x) for x in xs])[1], together[1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Box(1.0, 0.0), "low must be below high, got low=1.0"),
        (lambda: Ball(0.0), "radius must be > 0 and finite, got 0.0"),
        (lambda: Ball(1.0, norm=1.0), "norm must be in"),
        (lambda: Simplex(dim=0), "dim must be negative"),
        (lambda: Simplex(total=0.0), "total must be > 0"),
        (lambda: L1Ball(-1.0), "radius must be > 0"),
        (lambda: L1Ball(dim=1), "dim must be negative"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
