import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lit_methods.metrics import DynamicRegret, GradientVariation, PathLength, StaticRegret
from lit_methods.metrics.online_losses import LOSSES, minimize_quadratic, sample_gradients, sample_losses
from tests.distributed.launch import run_ranks

T, D = 25, 3


def stream(loss, seed=0, samples=2):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(T, samples, D, generator=generator, dtype=torch.float64)
    targets = torch.randn(T, samples, generator=generator, dtype=torch.float64)
    if loss in ("logistic", "hinge"):
        targets = (targets + features[..., 0]).sign()
    points = 0.3 * torch.randn(T, D, generator=generator, dtype=torch.float64)
    return features, targets, points


def filled(loss, radius):
    features, targets, points = stream(loss)
    metric = StaticRegret(loss, D, radius)
    losses = sample_losses(loss, points[:, None], features, targets)
    for t in range(5):
        metric.update(losses[t], features[t], targets[t])
    metric.update(losses[5:], features[5:], targets[5:])
    return metric


@pytest.mark.parametrize("radius", [0.3, 50.0, math.inf])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_point_is_better_than_the_best_point(loss, radius):
    if loss == "linear" and math.isinf(radius):
        return
    metric = filled(loss, radius)
    features, targets, points = stream(loss)

    def total(u):
        return float(sample_losses(loss, u, features, targets).mean(1).sum())

    u = metric.best_point()
    assert float(u.norm()) <= radius * (1 + 1e-9)
    played = float(sample_losses(loss, points[:, None], features, targets).mean(1).sum())
    assert float(metric.compute()) == pytest.approx(played - total(u), abs=1e-9)
    for seed in range(10):
        step = torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for scale in (1e-3, 0.1, 1.0):
            v = u + scale * step
            v = v * min(1.0, radius / float(v.norm()))
            assert total(u) <= total(v) + 1e-7


@pytest.mark.parametrize("loss", ["least_squares", "logistic"])
def test_scipy_finds_the_same_optimum(loss):
    features, targets, _ = stream(loss)
    inside = {"type": "ineq", "fun": lambda v: 0.25 - v @ v}
    best = minimize(
        lambda v: float(sample_losses(loss, torch.from_numpy(v), features, targets).mean(1).sum()),
        np.zeros(D),
        constraints=[inside],
        tol=1e-13,
    )
    np.testing.assert_allclose(filled(loss, 0.5).best_point().numpy(), best.x, atol=2e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_autograds(loss):
    features, targets, points = stream(loss)
    x = points.clone()[:, None].requires_grad_()
    sample_losses(loss, x, features, targets).sum().backward()
    ours = sample_gradients(loss, points[:, None], features, targets)
    torch.testing.assert_close(ours.sum(1), x.grad[:, 0])


def test_quadratic_minimiser_satisfies_its_optimality_conditions():
    a = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, vector = a @ a.T, torch.ones(5, dtype=torch.float64)
    u = minimize_quadratic(matrix, vector, 0.1)
    force = vector - matrix @ u
    assert float(u.norm()) == pytest.approx(0.1, rel=1e-12)
    torch.testing.assert_close(force / force.norm(), u / u.norm(), rtol=0, atol=1e-10)
    free = minimize_quadratic(matrix, vector, math.inf)
    torch.testing.assert_close(matrix @ free, vector, rtol=1e-8, atol=0)


def test_sums_over_successive_vectors():
    g = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    variation, path = GradientVariation(2), PathLength(2)
    for row in g:
        variation.update(row)
        path.update(row)
    assert float(variation.compute()) == 25 + 0 + 25
    assert float(path.compute()) == 5
    regret = DynamicRegret()
    regret.update(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5]))
    assert float(regret.compute()) == 1.5


def on_rank(rank):
    features, targets, points = stream("logistic")
    static, variation = StaticRegret("logistic", D, 1.0), GradientVariation(D)
    for t in range(T):
        a, y = features[t, rank : rank + 1], targets[t, rank : rank + 1]
        static.update(sample_losses("logistic", points[t], a, y), a, y)
        variation.update(points[t])
    return float(static.compute()), float(variation.compute())


def test_ranks_sum_their_losses():
    first, second = run_ranks(on_rank, 2)
    assert first == second
    features, targets, points = stream("logistic")
    joint, variation = StaticRegret("logistic", D, 1.0), GradientVariation(D)
    for t in range(T):
        variation.update(points[t])
        for i in (0, 1):
            a, y = features[t, i : i + 1], targets[t, i : i + 1]
            joint.update(sample_losses("logistic", points[t], a, y), a, y)
    assert first == pytest.approx((float(joint.compute()), float(variation.compute())), rel=1e-9)


@pytest.mark.parametrize("loss", ["least_squares", "abs"])
def test_state_survives_a_checkpoint(loss):
    metric = filled(loss, 1.0)
    other = StaticRegret(loss, D, 1.0)
    other.load_state_dict(metric.state_dict())
    assert float(other.compute()) == float(metric.compute())
    assert metric.to(torch.bfloat16).total.dtype == torch.float64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StaticRegret("log", 2), "loss must be one of"),
        (lambda: StaticRegret("abs", 0), "dim must be >= 1"),
        (lambda: StaticRegret("abs", 2, 0.0), "radius must be > 0"),
        (lambda: StaticRegret("linear", 2), "radius must be finite"),
        (lambda: PathLength(0), "dim must be >= 1"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
