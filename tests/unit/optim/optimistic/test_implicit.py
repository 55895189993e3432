import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from lit_methods.optim import Ball, ImplicitOMD, OptimisticOMD
from lit_methods.optim.optimistic.implicit import prox_absolute, prox_hinge
from tests.unit.optim.optimistic.online import draws

T, D = 30, 4


@pytest.mark.parametrize("eta", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_closed_forms_solve_their_argmin(eta, seed):
    """The minimiser lies on the line through x along a: compare with a search along it."""
    x, a = draws(D, seed=seed), draws(D, seed=10 + seed)
    for y, prox, phi in (
        (0.3, prox_absolute, lambda s: abs(s - 0.3)),
        (1.0, prox_hinge, lambda s: max(0.0, 1 - s)),
        (-1.0, prox_hinge, lambda s: max(0.0, 1 + s)),
    ):
        ours = prox(x, a, y, eta)

        def objective(c, phi=phi):
            u = x - c * a
            return float(phi(a @ u)) + float((u - x).square().sum()) / (2 * eta)

        best = minimize_scalar(objective, bounds=(-2 * eta, 2 * eta), method="bounded", options={"xatol": 1e-12})
        value = float(phi(a @ ours)) + float((ours - x).square().sum()) / (2 * eta)
        assert value <= best.fun + 1e-9
        torch.testing.assert_close(ours, x - best.x * a, rtol=0, atol=1e-4)


def absolute_rounds(make, prox=False):
    """Rounds of |a_t . x - b_t|; the points played."""
    a, b = draws(T, D), draws(T, seed=1)
    p = nn.Parameter(torch.zeros(D, dtype=torch.float64))
    optimizer = make([p])
    points = []
    for t in range(T):
        points.append(p.detach().clone())

        def closure(t=t):
            optimizer.zero_grad()
            loss = (a[t] @ p - b[t]).abs()
            loss.backward()
            return loss

        arguments = {"prox": lambda x, eta, t=t: prox_absolute(x, a[t], b[t], eta)} if prox else {}
        optimizer.step(closure, **arguments)
    return torch.stack([*points, p.detach()]).numpy(), a.numpy(), b.numpy()


def test_exact_prox_is_the_papers_algorithm():
    points, a, b = absolute_rounds(lambda ps: ImplicitOMD(ps, 2.0, grad_bound=3.0), prox=True)

    def slope(t, x):  # in torch, whose rounding decides the sign at a kink
        return float((torch.from_numpy(a[t]) @ torch.from_numpy(x) - float(b[t])).sign()) * a[t]

    center, last, variation = np.zeros(D), None, 0.0
    for t in range(T):
        x = points[t]
        g = slope(t, x)
        before = np.zeros(D) if last is None else slope(last, x)
        center = center - 2 / np.sqrt(36 + variation) * g
        variation += ((g - before) ** 2).sum()
        eta = 2 / np.sqrt(36 + variation)
        c = np.clip((a[t] @ center - b[t]) / (eta * a[t] @ a[t]), -1, 1)
        np.testing.assert_allclose(points[t + 1], center - eta * c * a[t], rtol=0, atol=1e-12)
        last = t


def test_inner_steps_approach_the_proximal_point():
    """On a smooth loss, many inner steps solve x = x_hat - eta grad f(x)."""
    z = torch.tensor([1.0, -2.0], dtype=torch.float64)
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = ImplicitOMD([p], 1.0, inner_steps=4000, grad_bound=1.0)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (p - z).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    center = 0.5 * z  # eta_1 = 1 / sqrt(4)
    eta = (4 + float(z.square().sum())) ** -0.5
    torch.testing.assert_close(p.detach(), (center + eta * z) / (1 + eta), rtol=1e-3, atol=0)


def test_stays_inside_and_needs_a_closure():
    points, _, _ = absolute_rounds(lambda ps: ImplicitOMD(ps, 2.0, constraint=Ball(0.2)))
    assert np.linalg.norm(points, axis=1).max() <= 0.2 + 1e-12
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="16-mixed"):
        ImplicitOMD([p]).step()


def test_variation_compares_functions_not_points():
    """|x - 1/3| at every round: one function, so the implicit variation stops growing; the explicit one does not."""

    def variation(make, **arguments):
        p = nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = make([p])
        for _ in range(100):

            def closure():
                optimizer.zero_grad()
                loss = (p - 1 / 3).abs()
                loss.backward()
                return loss

            optimizer.step(closure, **arguments)
        return float(optimizer.state[p]["variation"])

    prox = lambda x, eta: prox_absolute(x[None], torch.ones(1).double(), 1 / 3, eta)[0]  # noqa: E731
    assert variation(lambda ps: ImplicitOMD(ps, 2.0, grad_bound=1.0), prox=prox) == 1
    assert variation(lambda ps: OptimisticOMD(ps, 2.0, grad_bound=1.0)) > 20


@pytest.mark.parametrize("bad", [1, 2, 3, 4])
def test_a_round_with_a_bad_gradient_anywhere_is_as_if_it_had_never_been(bad):
    """At the played point, in an inner step, or at the next point."""

    def run(with_bad_round: bool) -> Tensor:
        a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 2.0))
        optimizer, calls = ImplicitOMD([a, b], lr=1.0, inner_steps=2), []

        def closure(scale: float = 1.0, of: tuple[Tensor, ...] = (a, b), bad: int = 0) -> Tensor:
            optimizer.zero_grad()
            calls.append(1)
            loss = scale * sum(x.square().sum() for x in of) * (torch.nan if len(calls) == bad else 1.0)
            loss.backward()
            return loss

        optimizer.step(closure)
        calls.clear()
        if with_bad_round:
            with pytest.warns(RuntimeWarning, match="ImplicitOMD skipped a step"):
                optimizer.step(lambda: closure(3.0, (b,), bad))
        for _ in range(2):
            optimizer.step(closure)
        return torch.cat([a, b]).detach()

    assert torch.equal(run(True), run(False))
