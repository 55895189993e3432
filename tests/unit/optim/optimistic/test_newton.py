import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from lit_methods.optim import OptimisticOnlineNewton
from lit_methods.optim.optimistic.newton import add_rank_one_, project_onto_ball
from tests.unit.optim.optimistic.online import draws, play

T, D = 60, 4


def project(y, matrix, radius):
    if np.linalg.norm(y) <= radius:
        return y
    low, high = 0.0, 1e8
    for _ in range(300):
        middle = (low + high) / 2
        x = np.linalg.solve(matrix + middle * np.eye(len(y)), matrix @ y)
        low, high = (middle, high) if np.linalg.norm(x) > radius else (low, middle)
    return x


@pytest.mark.parametrize("optimistic", [True, False])
@pytest.mark.parametrize("radius", [None, 0.5])
def test_is_the_papers_algorithm_with_explicit_matrices(radius, optimistic):
    g = draws(T, D)
    points, optimizer = play(
        lambda ps: OptimisticOnlineNewton(
            ps, beta=0.8, epsilon=1.5, radius=radius, optimism="last_gradient" if optimistic else "none"
        ),
        torch.zeros(D, dtype=torch.float64),
        g,
    )
    matrix, center = 1.5 * np.eye(D), np.zeros(D)
    for t, grad in enumerate(g.numpy()):
        center = project(center - np.linalg.solve(matrix, grad), matrix, radius or np.inf)
        matrix = matrix + 0.4 * np.outer(grad, grad)
        guess = grad if optimistic else np.zeros(D)
        expected = project(center - np.linalg.solve(matrix, guess), matrix, radius or np.inf)
        np.testing.assert_allclose(points[t + 1].numpy(), expected, rtol=0, atol=1e-10)
    (state,) = optimizer.state.values()
    np.testing.assert_allclose(state["matrix"].numpy(), matrix, rtol=1e-12)
    assert (torch.linalg.eigvalsh(state["matrix"]) >= 1.5 - 1e-9).all()
    torch.testing.assert_close(state["inverse"] @ state["matrix"], torch.eye(D).double(), rtol=0, atol=1e-10)


def test_one_dimension_has_a_closed_form():
    g = draws(T, 1)
    points, _ = play(lambda ps: OptimisticOnlineNewton(ps, beta=0.8, epsilon=1.5), torch.zeros(1).double(), g)
    h = 1.5 + 0.4 * torch.cat([torch.zeros(1, 1), g.square().cumsum(0)])
    center = -(g / h[:-1]).cumsum(0)
    torch.testing.assert_close(points[1:], center - g / h[1:], rtol=0, atol=1e-12)


def test_inverse_stays_exact_over_many_updates():
    matrix = torch.eye(10, dtype=torch.float64)
    inverse = matrix.clone()
    for t, g in enumerate(draws(2000, 10)):
        add_rank_one_(matrix, inverse, g, 0.5, refactor=t % 10 == 9)
    torch.testing.assert_close(inverse, torch.linalg.inv(matrix), rtol=1e-10, atol=1e-14)


def test_projection_agrees_with_scipy():
    a = draws(3, 3)
    matrix, y = (a @ a.T + 0.1 * torch.eye(3)).numpy(), np.array([2.0, -1.0, 1.0])
    ours = project_onto_ball(torch.from_numpy(y), torch.from_numpy(matrix), 1.0).numpy()
    inside = {"type": "ineq", "fun": lambda x: 1 - x @ x}
    best = minimize(lambda x: (x - y) @ matrix @ (x - y), np.zeros(3), constraints=[inside], tol=1e-14)
    np.testing.assert_allclose(ours, best.x, atol=1e-5)


def test_parameters_of_a_group_are_one_vector():
    g = draws(T, D)
    whole, _ = play(OptimisticOnlineNewton, torch.zeros(D, dtype=torch.float64), g)
    parts = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((1,), (1, 3))]
    optimizer = OptimisticOnlineNewton(parts)
    for grad in g:
        parts[0].grad, parts[1].grad = grad[:1].clone(), grad[None, 1:].clone()
        optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in parts]), whole[-1], rtol=0, atol=1e-12)


def test_theory_defaults_and_refusals():
    assert OptimisticOnlineNewton.theory_defaults(2.0, 2.0, 0.5) == {"beta": 1 / 32, "epsilon": 1 + 2 / 32}
    with pytest.raises(ValueError, match="grad_bound must be > 0"):
        OptimisticOnlineNewton.theory_defaults(0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="max_dim=4096 is less than the 5000 coordinates"):
        OptimisticOnlineNewton([nn.Parameter(torch.zeros(5000))])
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        OptimisticOnlineNewton(table.parameters()).step()


def test_beats_its_own_theory_constants_on_least_squares():
    """The card's observation: the formula's beta is far too cautious."""
    d, generator = 8, torch.Generator().manual_seed(0)
    a = torch.randn(3000, d, generator=generator, dtype=torch.float64)
    a = a / a.norm(dim=1, keepdim=True)
    solution = torch.full((d,), 0.25, dtype=torch.float64)
    y = a @ solution + 0.5 * (2 * torch.rand(3000, generator=generator, dtype=torch.float64) - 1)

    def regret(**arguments):
        points, _ = play(
            lambda ps: OptimisticOnlineNewton(ps, radius=1.0, **arguments),
            torch.zeros(d, dtype=torch.float64),
            lambda t, x: (a[t] @ x - y[t]) * a[t],
            3000,
        )
        best = torch.linalg.lstsq(a, y[:, None]).solution[:, 0]
        return float(0.5 * (((a * points[:-1]).sum(1) - y) ** 2 - (a @ best - y) ** 2).sum())

    assert regret(beta=10.0, epsilon=8.0) < 5
    assert regret(**OptimisticOnlineNewton.theory_defaults(2.5, 2.0, 1 / 6.25)) > 20
