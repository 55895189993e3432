import copy
import io
import pickle
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lit_methods.optim import Ball, Box, Hypentropy, OptimisticOMD, PNorm, Simplex
from tests.unit.optim.optimistic.online import draws, numpy_omd, play

T, D = 40, 5


def adaptive(lr, delta, bound):
    return lambda t, variation: lr / np.sqrt(delta + 4 * bound**2 + variation)


@pytest.mark.parametrize("optimistic", [True, False])
@pytest.mark.parametrize("radius", [None, 1.0])
def test_adaptive_step_is_the_papers_algorithm(radius, optimistic):
    g = draws(T, D)
    expected = numpy_omd(np.zeros(D), g.numpy(), adaptive(2.0, 0.3, 3.0), radius or np.inf, optimistic)
    points, _ = play(
        lambda ps: OptimisticOMD(
            ps,
            lr=2.0,
            delta=0.3,
            grad_bound=3.0,
            constraint=radius and Ball(radius),
            optimism="last_gradient" if optimistic else "none",
        ),
        torch.zeros(D, dtype=torch.float64),
        g,
    )
    np.testing.assert_allclose(points.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("radius", [None, 0.5])
def test_strongly_convex_step_is_the_papers_algorithm(radius):
    g = draws(T, D)
    expected = numpy_omd(np.zeros(D), g.numpy(), lambda t, _: 2 / (0.7 * t), radius or np.inf)
    points, _ = play(
        lambda ps: OptimisticOMD(
            ps, step_size="strongly_convex", strong_convexity=0.7, constraint=radius and Ball(radius)
        ),
        torch.zeros(D, dtype=torch.float64),
        g,
    )
    np.testing.assert_allclose(points.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("foreach", [None, False])
def test_constant_step_is_the_optimistic_gradient_method_bit_for_bit(foreach):
    g = draws(T, D).float()
    x, last, expected = torch.ones(D), torch.zeros(D), [torch.ones(D)]
    for grad in g:
        x = x.add(grad, alpha=-0.2).add(last, alpha=0.1)
        last = grad
        expected.append(x)
    points, optimizer = play(
        lambda ps: OptimisticOMD(ps, lr=0.1, step_size="constant", foreach=foreach), torch.ones(D), g
    )
    assert torch.equal(points, torch.stack(expected))
    (state,) = optimizer.state.values()
    assert [name for name, value in state.items() if isinstance(value, torch.Tensor)] == ["guess"], "one buffer"


def test_agrees_with_optax():
    optax = pytest.importorskip("optax")
    from jax import numpy as jnp

    g = draws(T, D).float()
    transform = optax.optimistic_gradient_descent(0.1)
    x, state = jnp.ones(D), transform.init(jnp.ones(D))
    for grad in g.numpy():
        updates, state = transform.update(jnp.asarray(grad), state)
        x = optax.apply_updates(x, updates)
    points, _ = play(lambda ps: OptimisticOMD(ps, lr=0.1, step_size="constant"), torch.ones(D), g)
    # optax takes the first gradient for the one before it, and so starts lr * g_1 further back
    np.testing.assert_allclose(points[-1].numpy(), np.asarray(x) - 0.1 * g[0].numpy(), atol=2e-6)


def test_without_optimism_it_is_gradient_descent():
    g = draws(T, D)
    points, optimizer = play(
        lambda ps: OptimisticOMD(ps, lr=0.1, step_size="constant", optimism="none"), torch.ones(D), g
    )
    expected, _ = play(lambda ps: torch.optim.SGD(ps, lr=0.1), torch.ones(D), g)
    assert torch.equal(points, expected)
    assert [list(state) for state in optimizer.state.values()] == [["rounds"]], "no buffer"


def test_difference_form_equals_two_steps_under_a_schedule():
    """The form without x-hat (a box that never binds forces the other) also when lr changes."""
    g = draws(T, D)
    rates = torch.linspace(1, 0.2, T)
    results = []
    for constraint in (None, Box(-1e9, 1e9)):
        for step_size in ("constant", "adaptive"):
            p = nn.Parameter(torch.ones(D, dtype=torch.float64))
            optimizer = OptimisticOMD([p], step_size=step_size, constraint=constraint)
            for grad, lr in zip(g, rates, strict=True):
                optimizer.param_groups[0]["lr"] = float(lr)
                p.grad = grad
                optimizer.step()
            results.append(p.detach())
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-13)
    torch.testing.assert_close(results[1], results[3], rtol=0, atol=1e-13)


def test_perfect_prediction_keeps_the_step():
    g = torch.tensor([3.0, 4.0]).expand(T, 2)
    _, optimizer = play(lambda ps: OptimisticOMD(ps, lr=2.0, delta=1.0), torch.zeros(2), g)
    (state,) = optimizer.state.values()
    assert float(state["variation"]) == 25
    assert float(state["step_size"]) == pytest.approx(2 / (1 + 4 * 25 + 25) ** 0.5)


def test_step_never_grows_and_the_first_move_has_not_seen_the_gradient():
    g = draws(T, D) * torch.logspace(-3, 1, T, dtype=torch.float64)[:, None]
    p = nn.Parameter(torch.zeros(D, dtype=torch.float64))
    optimizer = OptimisticOMD([p], constraint=Box(-1e9, 1e9))
    steps = []
    for grad in g:
        p.grad = grad
        optimizer.step()
        steps.append(float(optimizer.state[p]["step_size"]))
    assert all(a >= b > 0 for a, b in pairwise(steps))
    before = optimizer.state[p]["x_hat"].clone()
    p.grad = 1e6 * torch.ones_like(p)
    optimizer.step()
    used = (before - optimizer.state[p]["x_hat"]) / 1e6
    torch.testing.assert_close(used, torch.full_like(used, steps[-1]), rtol=1e-9, atol=0)
    assert float(optimizer.state[p]["step_size"]) < 1e-3 * steps[-1]


def test_zero_gradients_at_first_do_no_harm():
    g = torch.cat([torch.zeros(3, D), draws(T, D)])
    points, _ = play(lambda ps: OptimisticOMD(ps), torch.zeros(D), g)
    assert points.isfinite().all()
    assert float(points.norm(dim=1).max()) < 5


def test_user_hint_sees_the_gradient_and_a_perfect_hint_costs_nothing():
    g = draws(T + 1, D)
    clock = iter(range(1, T + 1))
    seen = []

    def oracle(p):
        t = next(clock)
        seen.append(torch.equal(p.grad, g[t - 1]))
        return g[t]

    points, optimizer = play(lambda ps: OptimisticOMD(ps, optimism=oracle), torch.zeros(D, dtype=torch.float64), g[:T])
    assert all(seen)
    assert float(next(iter(optimizer.state.values()))["variation"]) == pytest.approx(float(g[0].square().sum()))
    center, guess, eta = torch.zeros(D).double(), torch.zeros(D).double(), None
    largest = variation = 0.0
    for t in range(T):
        square = float(g[t].square().sum())
        eta = (4 * (largest or square) + variation) ** -0.5
        variation += float((g[t] - guess).square().sum())
        largest = max(largest, square)
        center = center - eta * g[t]
        guess = g[t + 1]
        expected = center - (4 * largest + variation) ** -0.5 * guess
        torch.testing.assert_close(points[t + 1], expected, rtol=0, atol=1e-13)


def test_entropy_is_optimistic_multiplicative_weights():
    g = draws(T, 3, 4)
    start = draws(3, 4, seed=1).softmax(-1)
    points, _ = play(
        lambda ps: OptimisticOMD(ps, lr=0.3, step_size="constant", mirror="entropy", constraint=Simplex()), start, g
    )
    expected = (start.log() - 0.3 * (g.cumsum(0) + g)).softmax(-1)
    torch.testing.assert_close(points[1:], expected, rtol=0, atol=1e-13)


def test_unnormalised_entropy_p_norm_and_hypentropy():
    g, start = draws(T, D), draws(D, seed=1).abs() + 0.1
    total = g.cumsum(0) + g
    points, _ = play(lambda ps: OptimisticOMD(ps, 0.1, step_size="constant", mirror="unnormalized_entropy"), start, g)
    torch.testing.assert_close(points[1:], start * (-0.1 * total).exp())
    points, _ = play(lambda ps: OptimisticOMD(ps, 0.1, step_size="constant", mirror=Hypentropy(0.5)), start, g)
    torch.testing.assert_close(points[1:], 0.5 * ((start / 0.5).asinh() - 0.1 * total).sinh())
    euclid, _ = play(lambda ps: OptimisticOMD(ps, 1.0), start, g)
    points, _ = play(lambda ps: OptimisticOMD(ps, 1.0, mirror=PNorm(2.0)), start, g)
    torch.testing.assert_close(points, euclid, rtol=0, atol=1e-13)
    inside = Ball(0.5, norm=1.5, per_tensor=True)
    small, _ = play(lambda ps: OptimisticOMD(ps, 1.0, mirror=PNorm(1.5), constraint=inside), 0.1 * start, g)
    assert float(torch.linalg.vector_norm(small, 1.5, -1).max()) <= 0.5 + 1e-12


def test_diagonal_adagrad_without_optimism_is_torchs_one_step_late():
    """Ours scales by the gradients before; for gradients of constant size the two differ by the first step only."""
    g = torch.tensor([1.0, -2.0]).expand(T, 2)
    ours, _ = play(
        lambda ps: OptimisticOMD(ps, 0.1, step_size="constant", mirror="adagrad", optimism="none"), torch.zeros(2), g
    )
    theirs, _ = play(lambda ps: torch.optim.Adagrad(ps, 0.1), torch.zeros(2), g)
    torch.testing.assert_close(ours[1:] - ours[1], theirs[:-1] - theirs[0])


def test_diagonal_adagrad_is_the_two_step_algorithm():
    g = draws(T, D)
    for constraint, radius in ((None, np.inf), (Ball(0.6), 0.6)):
        points, _ = play(
            lambda ps, c=constraint: OptimisticOMD(ps, 0.2, step_size="constant", mirror="adagrad", constraint=c),
            torch.zeros(D, dtype=torch.float64),
            g,
        )
        squares, center, guess = np.zeros(D), np.zeros(D), np.zeros(D)
        for t, grad in enumerate(g.numpy()):
            h = np.where(squares > 0, np.sqrt(squares), np.abs(grad)) + 1e-10
            squares += (grad - guess) ** 2
            center = weighted_ball(center - 0.2 * grad / h, h, radius)
            h = np.sqrt(squares) + 1e-10
            np.testing.assert_allclose(
                points[t + 1].numpy(), weighted_ball(center - 0.2 * grad / h, h, radius), rtol=0, atol=1e-9
            )
            guess = grad


def weighted_ball(y, w, radius):
    """Bisection on the multiplier."""
    if np.linalg.norm(y) <= radius:
        return y
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(w * y / (w + middle)) > radius else (low, middle)
    return w * y / (w + high)


def test_group_shares_one_step_and_parameters_may_have_their_own():
    def run(**arguments):
        ps = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
        optimizer = OptimisticOMD(ps, **arguments)
        for scale in (1.0, 2.0):
            for p, size in zip(ps, (1.0, 10.0), strict=True):
                p.grad = torch.full_like(p, scale * size)
            optimizer.step()
        return [float(optimizer.state[p]["variation"]) for p in ps]

    assert run() == pytest.approx([2 * 302, 2 * 302])
    assert run(per_parameter=True) == pytest.approx([2 * 2, 2 * 300])


def test_averaged_parameters_are_the_mean_of_played_points():
    g = draws(T, D)
    points, optimizer = play(lambda ps: OptimisticOMD(ps, average=True), torch.zeros(D, dtype=torch.float64), g)
    torch.testing.assert_close(optimizer.averaged_parameters()[0], points[:-1].mean(0))
    with pytest.raises(RuntimeError, match="average=True"):
        OptimisticOMD([nn.Parameter(torch.zeros(1))]).averaged_parameters()


def test_bfloat16_parameters_have_float32_master_state_that_survives_loading():
    g = 1e-3 * draws(300, D).abs()
    points, optimizer = play(lambda ps: OptimisticOMD(ps, 0.05, step_size="constant"), torch.ones(D).bfloat16(), g)
    assert points.dtype == torch.bfloat16
    expected = 1 - 0.05 * (g.sum(0) + g[-1])
    torch.testing.assert_close(points[-1].double(), expected, rtol=0.01, atol=0)
    assert (points[-1] < 1).all(), "steps below the resolution of bfloat16 must add up"
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = OptimisticOMD([nn.Parameter(points[-1].clone())], 0.05, step_size="constant")
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    (state,), (saved,) = other.state.values(), optimizer.state.values()
    assert state["x_hat"].dtype == torch.float32
    assert torch.equal(state["x_hat"], saved["x_hat"])


def test_infeasible_start_is_projected_with_a_warning():
    p = nn.Parameter(torch.full((2,), 3.0))
    with pytest.warns(UserWarning, match="outside the constraint set"):
        OptimisticOMD([p], constraint=Ball(1.0))
    assert float(p.detach().norm()) == pytest.approx(1)
    q = nn.Parameter(torch.tensor([0.5, 0.5, 0.0]))
    with pytest.warns(UserWarning, match="entries <= 0, where Entropy is not defined"):
        OptimisticOMD([q], mirror="entropy")
    assert float(q[2].detach()) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OptimisticOMD([nn.Parameter(torch.full((2,), 0.1))], constraint=Ball(1.0))


def test_own_projection():
    half_space = lambda x: x.clamp(min=0.25)  # noqa: E731
    points, _ = play(lambda ps: OptimisticOMD(ps, constraint=half_space), torch.ones(D), draws(T, D))
    assert float(points.min()) == 0.25


def test_copies_keep_the_geometry():
    p = nn.Parameter(torch.full((3,), 1 / 3))
    optimizer = OptimisticOMD([p], mirror="entropy", constraint=Simplex())
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        q, other = duplicate((p, optimizer))
        q.grad = torch.tensor([1.0, 0.0, -1.0])
        other.step()
        assert float(q.detach().sum()) == pytest.approx(1)
        assert (q > 0).all()


def test_one_number_leaves_the_device_in_a_step(monkeypatch):
    reads = []
    for name in ("item", "__bool__", "__float__", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, f=original, n=name: reads.append(n) or f(self))
    for arguments in (
        {},
        {"constraint": Ball(1.0)},
        {"grad_bound": 2.0},
        {"mirror": "p_norm"},
        {"per_parameter": True},
    ):
        p = nn.Parameter(torch.zeros(3))
        optimizer = OptimisticOMD([p], **arguments)
        reads.clear()
        for _ in range(3):
            p.grad = torch.ones(3)
            optimizer.step()
        assert reads == ["item"] * 3, arguments


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="OptimisticOMD does not support sparse gradients"):
        OptimisticOMD(table.parameters()).step()


def test_bilinear_game_converges_where_descent_ascent_diverges():
    """min_x max_y x y from (1, 1), lr 0.1, 1000 steps: the card's numbers."""

    def run(make):
        x, y = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))
        optimizer = make([{"params": [x]}, {"params": [y], "maximize": True}])
        for _ in range(1000):
            optimizer.zero_grad()
            (x * y).backward()
            optimizer.step()
        return float((x * x + y * y).detach().sqrt())

    assert run(lambda g: OptimisticOMD(g, 0.1, step_size="constant")) == pytest.approx(0.00896, abs=5e-6)
    assert run(lambda g: torch.optim.SGD(g, 0.1)) == pytest.approx(204.7, abs=0.05)


def test_rock_paper_scissors_converges_in_the_last_iterate():
    payoff = torch.tensor([[0, -1, 2], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64)

    def gap(optimism, rounds):
        x, y = (nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in ([0.6, 0.3, 0.1], [0.2, 0.5, 0.3]))
        optimizer = OptimisticOMD(
            [{"params": [x]}, {"params": [y], "maximize": True}],
            0.1,
            step_size="constant",
            mirror="entropy",
            optimism=optimism,
        )
        for _ in range(rounds):
            x.grad, y.grad = payoff @ y.detach(), payoff.T @ x.detach()
            optimizer.step()
        with torch.no_grad():
            return float((payoff.T @ x).max() - (payoff @ y).min())

    assert gap("last_gradient", 5000) < 1e-4
    assert gap("none", 5000) > 0.5
