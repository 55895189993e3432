"""The solver against closed forms, long Sinkhorn runs and the linear program; its gradients against differences."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from lit_methods.transport import OTResult, SinkhornNewton, semi_dual, sinkhorn_newton

F64 = torch.float64


def random_problem(n: int, m: int, batch: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(*batch, n, m, dtype=F64, generator=generator)
    a = torch.rand(*batch, n, dtype=F64, generator=generator) + 0.2
    b = torch.rand(*batch, m, dtype=F64, generator=generator) + 0.2
    return cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def assignment(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, n)))


def long_sinkhorn(cost: Tensor, a: Tensor, b: Tensor, eta: float, sweeps: int = 5000) -> Tensor:
    g = torch.zeros_like(b)
    for _ in range(sweeps):
        f = a.log() - torch.logsumexp(g[..., None, :] - eta * cost, -1)
        g = b.log() - torch.logsumexp(f[..., None] - eta * cost, -2)
    return torch.exp(f[..., None] + g[..., None, :] - eta * cost)


def linear_program(cost: Tensor, a: Tensor, b: Tensor) -> float:
    n, m = cost.shape
    constraints = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    return float(linprog(cost.flatten().numpy(), A_eq=constraints, b_eq=np.concatenate([a, b])).fun)


def pixels(p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two scikit-learn digits on a grid of 16x16, with the cost |x - y|_1 or |x - y|_2^2 over its maximum."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images[:2])[:, None]
    images = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear").flatten(1) / 16 + 0.01
    images = images / images.sum(1, keepdim=True)
    grid = torch.cartesian_prod(torch.arange(16.0, dtype=F64), torch.arange(16.0, dtype=F64))
    cost = torch.cdist(grid, grid, p=1) if p == 1 else torch.cdist(grid, grid).square()
    return cost / cost.max(), images[0], images[1]


@pytest.mark.parametrize("sparsity", ["adaptive", "topk", "dense"])
@pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 9), (9, 5)])
def test_equals_a_long_sinkhorn_run(sparsity, n, m, monkeypatch):
    monkeypatch.setattr(semi_dual, "_DENSE_WORK", 0)
    cost, a, b = random_problem(n, m, (3,))
    for eta in (10.0, 50.0):
        result = sinkhorn_newton(cost, a, b, eta=eta, sparsity=sparsity, nnz_per_row=4)
        torch.testing.assert_close(result.plan, long_sinkhorn(cost, a, b, eta), atol=1e-10, rtol=0)
        assert result.converged.all()


def test_fields_fit_together():
    cost, a, b = random_problem(8, 6, (2, 3))
    result = sinkhorn_newton(cost, a, b, eta=80.0)
    assert isinstance(result, OTResult)
    assert result.plan.shape == (2, 3, 8, 6)
    assert result.f.shape == (2, 3, 8)
    assert result.g.shape == (2, 3, 6)
    assert {x.shape for x in result[3:]} == {(2, 3)}
    torch.testing.assert_close(result.plan.sum(-1), a, atol=1e-10, rtol=0)
    torch.testing.assert_close(result.plan.sum(-2), b, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        result.plan, torch.exp(80 * (result.f[..., None] + result.g[..., None, :] - cost) - 1), atol=1e-14, rtol=0
    )
    entropy = torch.special.xlogy(result.plan, result.plan).sum((-2, -1))
    torch.testing.assert_close(result.cost, (cost * result.plan).sum((-2, -1)))
    torch.testing.assert_close(result.value, result.cost + entropy / 80, atol=1e-12, rtol=0)
    torch.testing.assert_close(result.f.mean(-1), result.g.mean(-1))


@pytest.mark.parametrize("tilt", [0.0, 0.3, -1.7])
def test_two_by_two_closed_form(tilt):
    """P11 P22 / (P12 P21) = exp(-eta (C11 + C22 - C12 - C21)), a quadratic equation in P11."""
    a, b, eta = torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([0.6, 0.4], dtype=F64), 5.0
    cost = torch.tensor([[tilt, 1.0], [0.5, 0.2]], dtype=F64)
    k = math.exp(-eta * (tilt + 0.2 - 1.5))
    # p (b2 - a1 + p) = k (a1 - p)(b1 - p)
    roots = np.roots([1 - k, 0.4 - 0.3 + k * 0.9, -k * 0.3 * 0.6])
    p = next(root for root in roots.real if 0 < root < 0.3)
    torch.testing.assert_close(float(sinkhorn_newton(cost, a, b, eta=eta).plan[0, 0]), p, atol=1e-12, rtol=0)


def test_small_eta_gives_the_product_and_large_eta_the_linear_program():
    cost, a, b = random_problem(12, 9)
    torch.testing.assert_close(sinkhorn_newton(cost, a, b, eta=1e-6).plan, a[:, None] * b[None], atol=1e-7, rtol=0)
    optimum = linear_program(cost, a, b)
    for eta in (100.0, 1000.0, 20000.0):
        gap = float(sinkhorn_newton(cost, a, b, eta=eta).cost) - optimum
        assert -1e-9 < gap < math.log(12 * 9) / eta


def test_symmetries():
    cost, a, b = random_problem(9, 7)
    result = sinkhorn_newton(cost, a, b, eta=200.0)

    def same(plan: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(plan, expected, atol=1e-9, rtol=0)

    same(sinkhorn_newton(cost.T, b, a, eta=200.0).plan.T, result.plan)
    shifted = cost + torch.linspace(-1, 2, 9, dtype=F64)[:, None] + torch.linspace(0, 3, 7, dtype=F64)
    same(sinkhorn_newton(shifted, a, b, eta=200.0).plan, result.plan)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    same(sinkhorn_newton(cost[order], a[order], b, eta=200.0).plan, result.plan[order])
    scaled = sinkhorn_newton(cost, 3 * a, 3 * b, eta=200.0)
    same(scaled.plan, 3 * result.plan)
    entropy = torch.special.xlogy(scaled.plan, scaled.plan).sum()
    torch.testing.assert_close(scaled.value, scaled.cost + entropy / 200)


def test_random_assignment_of_the_paper_in_few_iterations():
    """n = 500, eta = 1200 (Table 1: 20 + 9 iterations); the optimal value was computed independently."""
    for settings in ({"eps_scaling": 0}, {}):
        result = sinkhorn_newton(assignment(500), eta=1200.0, tol=1e-12, **settings)
        assert result.converged
        assert float(result.value) == pytest.approx(-0.0023765243673039, abs=1e-14)
        assert int(result.n_sinkhorn + result.n_newton) <= 35


def test_almost_a_permutation():
    """eta = 2000 at n = 200: weights of the graph between matched pairs fall below 1e-9."""
    result = sinkhorn_newton(assignment(200, 3), eta=2000.0, tol=1e-12)
    assert result.converged
    cost = assignment(200, 3)
    result = sinkhorn_newton(cost, eta=50000.0, tol=1e-9)
    assert result.converged
    optimum = float(cost[linear_sum_assignment(cost)].mean())
    assert -1e-9 < float(result.cost) - optimum < math.log(200**2) / 50000


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dense_work", [0, 2**30])
def test_images(p, dense_work, monkeypatch):
    monkeypatch.setattr(semi_dual, "_DENSE_WORK", dense_work)
    cost, a, b = pixels(p)
    result = sinkhorn_newton(cost, a, b, eta=1200.0)
    assert result.converged
    assert int(result.n_newton) < 80


def test_batch_equals_one_by_one():
    cost, a, b = random_problem(20, 20, (4,))
    cost = cost * torch.tensor([0.0, 0.1, 1.0, 3.0], dtype=F64)[:, None, None]  # unequally hard
    together = sinkhorn_newton(cost, a, b, eta=300.0)
    for k in range(4):
        alone = sinkhorn_newton(cost[k], a[k], b[k], eta=300.0)
        torch.testing.assert_close(together.plan[k], alone.plan, atol=1e-9, rtol=0)
    assert together.converged.all()
    assert together.n_newton[0] < together.n_newton[3]


def test_only_hard_problems_of_a_batch_are_started_again():
    cost, a, b = pixels(1)
    easy = torch.rand(256, 256, dtype=F64, generator=torch.Generator().manual_seed(0)) / 10
    both = sinkhorn_newton(torch.stack([easy, cost]), a, b, eta=1200.0)
    assert both.converged.all()
    assert int(both.n_sinkhorn[0]) == 20 < int(both.n_sinkhorn[1])
    torch.testing.assert_close(both.plan[1], sinkhorn_newton(cost, a, b, eta=1200.0).plan, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 4)])
def test_a_single_row_or_column(shape):
    cost, a, b = (x.requires_grad_() for x in random_problem(*shape))
    result = sinkhorn_newton(cost, a, b, eta=10.0)
    torch.testing.assert_close(result.plan, a[:, None] * b, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(result.cost, cost)
    torch.testing.assert_close(gradient, result.plan, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dense_work", [0, 2**30])
def test_memory_layout_does_not_matter(dense_work, monkeypatch):
    monkeypatch.setattr(semi_dual, "_DENSE_WORK", dense_work)
    cost, a, b = random_problem(9, 9, (2,))
    other_layout = cost.mT.contiguous().mT
    assert torch.equal(sinkhorn_newton(other_layout, a, b, eta=100.0).plan, sinkhorn_newton(cost, a, b, eta=100.0).plan)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_warm_start(shape):
    """From the solution of a nearby problem: fewer steps, the same solution."""
    cost, a, b = random_problem(*shape, (2,))
    solve = SinkhornNewton(100.0, warmup=2)
    start = solve(1.001 * cost, a, b).g
    cold, warm = solve(cost, a, b), solve(cost, a, b, start)
    torch.testing.assert_close(warm.plan, cold.plan, atol=1e-9, rtol=0)
    assert warm.converged.all()
    assert (warm.n_newton < cold.n_newton).all()
    again = sinkhorn_newton(cost, a, b, eta=100.0, warmstart=cold.g)
    assert not again.n_newton.any()
    assert not again.n_sinkhorn.any()


def test_weights_broadcast_over_the_batch():
    cost, a, b = random_problem(6, 5, (3,))
    result = sinkhorn_newton(cost, a[0], b[1], eta=20.0)
    expected = sinkhorn_newton(cost, a[0].expand(3, 6), b[1].expand(3, 5), eta=20.0)
    torch.testing.assert_close(result.plan, expected.plan)


def test_without_newton_it_is_sinkhorn_and_without_warmup_it_is_newton():
    cost, a, b = random_problem(8, 8)
    only_sinkhorn = sinkhorn_newton(cost, a, b, eta=20.0, warmup=7, max_newton=0)
    g = torch.zeros(8, dtype=F64)
    for _ in range(7):
        f = a.log() - torch.logsumexp(g - 20 * cost, -1)
        g = b.log() - torch.logsumexp(f[:, None] - 20 * cost, -2)
    f = a.log() - torch.logsumexp(g - 20 * cost, -1)
    expected = torch.exp(f[:, None] + g - 20 * cost)
    torch.testing.assert_close(only_sinkhorn.plan, expected, atol=1e-14, rtol=0)
    assert (int(only_sinkhorn.n_sinkhorn), int(only_sinkhorn.n_newton)) == (7, 0)
    only_newton = sinkhorn_newton(assignment(60), eta=300.0, warmup=0, eps_scaling=0)
    assert only_newton.converged
    assert int(only_newton.n_sinkhorn) == 0


def test_sweeps_survive_the_underflow_of_a_whole_column():
    cost = torch.zeros(3, 3, dtype=F64)
    cost[:, 2] = 1.0
    result = sinkhorn_newton(cost, eta=5000.0, eps_scaling=0, warmup=2, max_newton=0)
    torch.testing.assert_close(result.plan, torch.full((3, 3), 1 / 9, dtype=F64))


def test_objective_rises_with_every_newton_step():
    cost, a, b = pixels(1)
    values = [
        float(sinkhorn_newton(cost, a, b, eta=400.0, eps_scaling=0, max_newton=k).value) for k in (1, 2, 4, 8, 16)
    ]
    assert values == sorted(values)


def test_forbidden_pairs():
    cost, a, b = random_problem(6, 6)
    cost[0, 1:] = math.inf
    b[0] += 0.5
    b = b / b.sum()
    result = sinkhorn_newton(cost, a, b, eta=30.0)
    assert result.converged
    assert float(result.plan[0, 1:].sum()) == 0
    assert torch.isfinite(result.cost)
    blocked = cost.nan_to_num(posinf=1e3)
    torch.testing.assert_close(result.plan, sinkhorn_newton(blocked, a, b, eta=30.0).plan, atol=1e-9, rtol=0)


def test_float32_and_reduced_precision():
    cost, a, b = random_problem(30, 30)
    exact = sinkhorn_newton(cost, a, b, eta=100.0)
    single = sinkhorn_newton(cost.float(), a.float(), b.float(), eta=100.0)
    assert single.plan.dtype == torch.float32
    assert single.converged
    assert float((single.plan - exact.plan).abs().sum()) < 1e-3
    half = cost.bfloat16()
    assert sinkhorn_newton(half, eta=100.0).value.dtype == torch.float32
    assert sinkhorn_newton(cost.float(), eta=100.0, dtype=F64).value.dtype == F64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sinkhorn_newton(cost.float(), a.float(), b.float(), eta=100.0)
    assert torch.equal(inside.plan, single.plan)


def skewed(*shape: int, seed: int) -> Tensor:
    """Weights over ten orders of magnitude."""
    return (-23 * torch.rand(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def test_weights_over_ten_orders_of_magnitude():
    cost = torch.rand(60, 25, 25, dtype=F64, generator=torch.Generator().manual_seed(0))
    result = sinkhorn_newton(cost, skewed(60, 25, seed=1), skewed(60, 25, seed=2), eta=2000.0)
    assert result.converged.all()


def test_gradients_are_finite_where_the_tolerance_leaves_a_column_empty():
    cost = torch.tensor([[0.0, 1.0], [0.0, 1.0]], requires_grad=True)
    result = sinkhorn_newton(cost, b=torch.tensor([1 - 1e-7, 1e-7]), eta=1000.0)
    assert result.converged
    assert (result.plan.detach().sum(0) == 0).any()
    (gradient,) = torch.autograd.grad(result.cost, cost)
    assert gradient.isfinite().all()


def test_float32_converges_where_gains_are_below_rounding():
    cost = torch.rand(60, 20, 20, generator=torch.Generator().manual_seed(0))
    for eta in (10.0, 40.0):
        assert sinkhorn_newton(cost, eta=eta, warmup=5).converged.all()


@pytest.mark.parametrize("kind", ["assignment", "squared", "distance"])
def test_float32_reaches_a_marginal_error_of_1e_5(kind):
    """Where ``eta`` times a rounding error of the costs is ten times as much."""
    grid = torch.cartesian_prod(torch.arange(12.0), torch.arange(12.0))
    cost = (
        assignment(144).float() if kind == "assignment" else torch.cdist(grid, grid) ** (2 if kind == "squared" else 1)
    )
    _, a, b = random_problem(144, 144)
    result = sinkhorn_newton(cost / cost.max(), a.float(), b.float(), eta=1200.0)
    exact = sinkhorn_newton((cost / cost.max()).double(), a, b, eta=1200.0)
    assert float(result.marginal_error) < 1e-5
    assert bool(result.converged)
    torch.testing.assert_close(result.cost, exact.cost.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("dtype", "constant", "tolerance"), [(torch.float32, 1e3, 2e-2), (F64, -1e5, 1e-8)])
def test_a_constant_added_to_the_cost_does_not_matter(dtype, constant, tolerance):
    """The rounding of ``cost + constant`` remains, ``eta`` times 3e-5 and 7e-12."""
    cost, a, b = (x.to(dtype) for x in random_problem(30, 40))
    moved = (cost + constant).requires_grad_()
    weights = a.clone().requires_grad_()
    plain, far = (sinkhorn_newton(c, w, b, eta=300.0) for c, w in ((cost, a), (moved, weights)))
    assert bool(far.converged)
    assert int(far.n_newton) <= int(plain.n_newton) + 1
    assert float((far.plan - plain.plan).detach().abs().sum()) < tolerance
    torch.testing.assert_close(far.plan, (300 * (far.f[:, None] + far.g - moved) - 1).exp(), rtol=0.1, atol=1e-6)
    for field in ("value", "cost"):
        torch.testing.assert_close(getattr(far, field), getattr(plain, field) + constant, rtol=1e-6, atol=tolerance)
    far.value.backward()
    assert float((moved.grad - plain.plan).abs().sum()) < tolerance
    torch.testing.assert_close(weights.grad - weights.grad.mean(), far.f - far.f.mean(), rtol=0, atol=1e-3)
    torch.testing.assert_close(SinkhornNewton(300.0).value(moved, a, b), far.value)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_histograms_with_empty_bins_make_a_batch(dtype):
    cost, a, b = (x.to(dtype) for x in random_problem(9, 12, (3,)))
    a[0, :4], a[1, 3], b[1, 5:], b[2, 0] = 0, 0, 0, 0
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    cost.requires_grad_()
    together = sinkhorn_newton(cost, a, b, eta=100.0)
    assert bool(together.converged.all())
    (together.cost.sum() + together.value.sum()).backward()
    for i in range(3):
        rows, columns = a[i] > 0, b[i] > 0
        part = cost.detach()[i][rows][:, columns].requires_grad_()
        alone = sinkhorn_newton(part, a[i, rows], b[i, columns], eta=100.0)
        (alone.cost + alone.value).backward()
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-9}
        torch.testing.assert_close(together.plan[i][rows][:, columns], alone.plan, **tolerance)
        torch.testing.assert_close(together.cost[i], alone.cost, **tolerance)
        torch.testing.assert_close(cost.grad[i][rows][:, columns], part.grad, **{**tolerance, "atol": 1e-3})
        assert float(cost.grad[i][~rows].abs().sum() + cost.grad[i][:, ~columns].abs().sum()) < 1e-4


def test_weights_and_starts_broadcast_over_two_batch_dimensions():
    cost, a, b = random_problem(4, 5, (2, 3))
    result = sinkhorn_newton(cost, a[0], b[1, 2], eta=20.0)
    again = sinkhorn_newton(cost, a[0], b[1, 2], eta=20.0, warmstart=result.g)
    torch.testing.assert_close(result.plan.sum(-1), a[0].expand(2, 3, 4), rtol=0, atol=1e-9)
    torch.testing.assert_close(result.plan.sum(-2), b[1, 2].expand(2, 3, 5), rtol=0, atol=1e-9)
    torch.testing.assert_close(again.plan, result.plan, rtol=0, atol=1e-9)
    assert int(again.n_sinkhorn.max()) == 0


def test_only_topk_thins_a_hessian_that_is_not_sparse(monkeypatch):
    """Half of the plan is a bad Hessian; ``adaptive`` then takes it whole, by conjugate gradients."""
    monkeypatch.setattr(semi_dual, "_DENSE_WORK", 0)
    cost, a, b = random_problem(20, 20, (1,))
    directions = {}
    for sparsity in ("dense", "topk", "adaptive"):
        dual = semi_dual.DenseDual(cost, 5.0, a, b, torch.empty_like(cost), sparsity, 10, False)
        at = dual.at(1.0, torch.zeros_like(b))._replace(error=torch.full((1,), 1e-12, dtype=F64))
        direction = dual.direction(1.0, at, b - at.columns, torch.zeros(1, 1, dtype=F64))
        directions[sparsity] = direction - direction.mean()  # adding a constant changes no plan
    torch.testing.assert_close(directions["adaptive"], directions["dense"], rtol=0, atol=1e-4)
    assert float((directions["topk"] - directions["dense"]).abs().max()) > 1e-2


def test_exact_marginal_is_that_of_the_longer_side():
    for shape, exact, near in (((30, 20), -1, -2), ((20, 30), -2, -1)):
        cost = random_problem(*shape)[0]
        plan, *_, error, _ = sinkhorn_newton(cost, eta=300.0, tol=1e-3)
        assert 1e-9 < float(error) < 1e-3
        assert float((plan.sum(exact) - 1 / 30).abs().sum()) < 1e-13
        torch.testing.assert_close((plan.sum(near) - 1 / 20).abs().sum(), error, atol=1e-13, rtol=0)


def test_the_tolerance_does_not_grow_without_bound_with_rounding():
    result = sinkhorn_newton(assignment(40).float(), eta=1e6)
    assert result.converged
    assert float(result.marginal_error) <= 0.01


def test_reports_what_did_not_converge():
    result = sinkhorn_newton(assignment(50), eta=1000.0, max_newton=1, eps_scaling=0)
    assert not result.converged
    assert float(result.marginal_error) > 1e-6


# gradients


def logits_problem(n: int, m: int, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = ((*batch, n, m), (*batch, n), (*batch, m))
    return tuple(torch.randn(s, dtype=F64, generator=generator).requires_grad_() for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize(("n", "m"), [(4, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("field", ["value", "cost", "plan", "f", "g"])
def test_gradients_are_those_of_differences(field, n, m):
    """Through softmax weights, because only weights of equal sum make a problem."""

    def solve(cost: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return getattr(sinkhorn_newton(cost, x.softmax(-1), y.softmax(-1), eta=3.0, tol=1e-14), field)

    torch.autograd.gradcheck(solve, logits_problem(n, m, (2,)))


def test_value_has_second_derivatives():
    def solve(cost: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_newton(cost, x.softmax(-1), y.softmax(-1), eta=3.0, tol=1e-14).value

    torch.autograd.gradgradcheck(solve, logits_problem(4, 3))


@pytest.mark.parametrize("field", ["cost", "plan", "f"])
def test_other_second_derivatives_are_refused(field):
    cost = random_problem(4, 3)[0].requires_grad_()
    output = getattr(sinkhorn_newton(cost, eta=5.0), field).square().sum()
    (gradient,) = torch.autograd.grad(output, cost, create_graph=True)
    with pytest.raises(RuntimeError, match="Second derivatives of an optimal transport plan"):
        gradient.sum().backward()


def test_envelope_theorem():
    cost, a, b = (x.requires_grad_() for x in random_problem(7, 5))
    result = sinkhorn_newton(cost, a, b, eta=40.0)
    gradients = torch.autograd.grad(result.value, (cost, a, b))
    for gradient, expected in zip(gradients, (result.plan, result.f, result.g), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-15, rtol=0)
    value = SinkhornNewton(eta=40.0).value(cost, a, b)
    assert torch.equal(value, result.value)
    torch.testing.assert_close(torch.autograd.grad(value, cost)[0], result.plan, atol=1e-15, rtol=0)


def test_gradient_of_the_cost_in_the_almost_permutation_regime():
    """Weak coupling makes the Hessian nearly singular; the directional derivative must still be right."""
    cost = assignment(30).requires_grad_()
    eta = 400.0
    result = sinkhorn_newton(cost, eta=eta, tol=1e-14)
    (gradient,) = torch.autograd.grad(result.cost, cost)
    direction = torch.randn(30, 30, dtype=F64, generator=torch.Generator().manual_seed(2))
    h = 1e-6
    ahead, behind = (sinkhorn_newton(cost.detach() + s * h * direction, eta=eta, tol=1e-14).cost for s in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-9)


def test_gradient_of_the_value_with_forbidden_pairs_is_finite():
    cost = random_problem(4, 4)[0]
    cost[0, 1] = math.inf
    cost.requires_grad_()
    for field in ("value", "cost"):
        (gradient,) = torch.autograd.grad(getattr(sinkhorn_newton(cost, eta=5.0), field), cost)
        assert torch.isfinite(gradient).all()
        assert gradient[0, 1] == 0


# arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": None}, "give exactly one of eta and reg"),
        ({"reg": 0.1}, "give exactly one of eta and reg"),
        ({"eta": 0.0}, "eta must be > 0"),
        ({"eta": None, "reg": -1.0}, "reg must be > 0"),
        ({"tol": 0.0}, "tol must be > 0"),
        ({"warmup": -1}, "warmup must be >= 0"),
        ({"max_newton": -1}, "max_newton must be >= 0"),
        ({"nnz_per_row": 0}, "nnz_per_row must be >= 1"),
        ({"eps_scaling": -1}, "eps_scaling must be >= 0"),
        ({"sparsity": "sparse"}, "sparsity must be 'adaptive'"),
        ({"dtype": torch.float16}, "dtype must be torch.float32"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        SinkhornNewton(**({"eta": 10.0} | arguments))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ((torch.ones(3),), "cost must have shape"),
        ((torch.ones(3, 0),), "cost must have shape"),
        ((torch.ones(0, 3, 3),), "cost must have shape"),
        ((torch.ones(3, 3, dtype=torch.int64),), "cost must be floating point"),
        ((torch.full((2, 2), math.nan),), "cost must hold no NaN"),
        ((torch.full((2, 2), -math.inf),), "cost must hold no NaN and no -inf"),
        ((torch.tensor([[1.0, math.inf], [1.0, math.inf]]),), "cost must have a finite entry"),
        ((torch.ones(2, 2), torch.tensor([math.nan, 0.5])), "a must be >= 0"),
        ((torch.ones(2, 2), None, torch.tensor([1.5, -0.5])), "b must be >= 0"),
        ((torch.ones(2, 2), torch.zeros(2), torch.zeros(2)), "a and b must have a sum > 0"),
        ((torch.tensor([[1.0, 2.0], [math.inf, math.inf]]),), "a finite entry in every row and every column"),
        ((torch.tensor([[1.0, math.inf], [2.0, math.inf]]),), "a finite entry in every row and every column"),
        ((torch.ones(2, 2), torch.ones(3) / 3), "a must have shape"),
        ((torch.ones(2, 2), None, torch.tensor(1.0)), "b must have shape"),
        ((torch.ones(2, 2), torch.tensor([1, 1])), "a must be floating point"),
        ((torch.ones(2, 2), torch.tensor([0.5, 0.6])), "a and b must have equal sums"),
    ],
)
def test_bad_problems(problem, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_newton(*problem, eta=10.0)


@pytest.mark.parametrize("start", [torch.zeros(2), torch.full((3,), math.nan)])
def test_bad_warm_start(start):
    with pytest.raises(ValueError, match="warmstart must be finite and have shape"):
        sinkhorn_newton(torch.zeros(2, 3), eta=1.0, warmstart=start)


def test_settings_are_in_the_repr():
    assert "eta=50" in repr(SinkhornNewton(reg=0.02))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dense_work", [0, 2**30])
def test_cuda_agrees_with_the_cpu(dense_work, monkeypatch):
    monkeypatch.setattr(semi_dual, "_DENSE_WORK", dense_work)
    cost, a, b = random_problem(60, 50, (3,))
    on_cpu = sinkhorn_newton(cost, a, b, eta=300.0)
    on_gpu = sinkhorn_newton(cost.cuda(), a.cuda(), b.cuda(), eta=300.0)
    assert on_gpu.converged.all()
    torch.testing.assert_close(on_gpu.plan.cpu(), on_cpu.plan, atol=1e-9, rtol=0)
