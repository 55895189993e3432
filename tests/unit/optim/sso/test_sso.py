"""SSO's surrogate, step-size rules and inner solvers against closed forms and sequences computed here."""

import copy
import dataclasses
import functools
import io
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_methods.optim import SSO
from lit_methods.optim.sso import (
    AdaGrad,
    AdaGradPerExample,
    Armijo,
    ArmijoDescent,
    ConjugateGradient,
    Constant,
    Exponential,
    GaussNewton,
    Newton,
    OptimizerSteps,
    Sqrt,
    StepRule,
    StrongWolfeLBFGS,
)
from lit_methods.optim.sso.solvers import InnerSolver, inner_solver
from lit_methods.optim.sso.surrogate import TargetSurrogate, kl_divergence
from tests.contract.compare import assert_same

Loss = Callable[[Tensor], Tensor]
N, D, K = 12, 5, 3
INNER = {
    "gauss_newton": {"inner": "gauss_newton"},
    "cg": {"inner": "cg"},
    "lbfgs": {"inner": "lbfgs"},
    "armijo": {"inner": "armijo"},
    "adam": {"inner": "adam"},
    "sgd": {"inner": functools.partial(torch.optim.SGD, lr=0.05)},
    "callable": {"inner": lambda params: torch.optim.RMSprop(params, lr=1e-3)},
}


def few(inner: str, steps: int) -> InnerSolver:
    return dataclasses.replace(inner_solver(INNER[inner]["inner"]), steps=steps)


def data(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_net(linear: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return (nn.Linear(D, K) if linear else nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, K))).to(dtype)


def squared(z: Tensor) -> Tensor:
    return 0.5 * (z - data(3)[:, :K]).square().sum(1).mean()


def logistic(z: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(z, (data(4)[:, :K] > 0).double(), reduction="none").sum(1).mean()


def cross_entropy(z: Tensor) -> Tensor:
    return functional.cross_entropy(z, torch.arange(N) % K)


LOSSES: dict[str, tuple[Loss, float]] = {"mse": (squared, 1.0), "bce": (logistic, 4.0), "ce": (cross_entropy, 2.0)}


def surrogate_of(net: nn.Module, loss: Loss, eta: float, **options) -> tuple[TargetSurrogate, Tensor]:
    x = data()
    z = net(x).detach()
    point = z.clone().requires_grad_()
    value = loss(point)
    (slope,) = torch.autograd.grad(value, point)
    return TargetSurrogate(lambda: [net(x)], list(net.parameters()), [z], [slope], N, eta, **options), value.detach()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def run(net: nn.Module, loss: Loss, steps: int, **options) -> list[float]:
    optimizer = SSO(net.parameters(), **options)
    return [float(optimizer.step(lambda: (net(data()), loss))) for _ in range(steps)]


# ---- the surrogate


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("eta", [0.1, 3.0])
def test_gradient_at_the_start_is_the_losss_gradient(name, eta) -> None:
    loss, _ = LOSSES[name]
    net = make_net()
    surrogate, _ = surrogate_of(net, loss, eta)
    assert surrogate.value() == 0.0
    expected = torch.autograd.grad(loss(net(data())), list(net.parameters()))
    for g, e in zip(surrogate.gradient(), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_bounds_the_loss_from_above_for_eta_up_to_1_over_smoothness(name) -> None:
    loss, eta = LOSSES[name]
    net = make_net()
    surrogate, start = surrogate_of(net, loss, eta)
    for scale in (0.01, 0.3, 3.0):
        for seed in range(5):
            torch.manual_seed(seed)
            kept = copy.deepcopy(net.state_dict())
            with torch.no_grad():
                for p in net.parameters():
                    p.add_(torch.randn_like(p), alpha=scale)
                assert surrogate.value(graph=False) + start >= loss(net(data())) - 1e-12
            net.load_state_dict(kept)


def test_does_not_bound_it_for_a_longer_eta() -> None:
    net = make_net(linear=True)
    surrogate, start = surrogate_of(net, squared, 2.0)
    with torch.no_grad():
        net.weight.add_(1.0)
    assert surrogate.value(graph=False) + start < squared(net(data()))


@pytest.mark.parametrize("divergence", [None, kl_divergence])
@pytest.mark.parametrize("linear", [True, False])
def test_curvature_is_the_gauss_newton_form(linear, divergence) -> None:
    """Against a Jacobian from functorch and a dense Hessian in the space of targets, with and without forward mode."""
    net, eta = nn.Sequential(make_net(linear), nn.Softmax(1)), 0.7
    surrogate, _ = surrogate_of(
        net, cross_entropy, eta, divergence=divergence, decay=[0.3] * len(list(net.parameters()))
    )
    direction = [torch.randn_like(p) for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]
    params, tangents = dict(net.named_parameters()), dict(zip(names, direction, strict=True))
    f, jd = torch.func.jvp(lambda p: torch.func.functional_call(net, p, data()), (params,), (tangents,))
    metric = torch.ones_like(f) if divergence is None else 1 / f
    decay = 0.3 * sum(float(d.square().sum()) for d in direction)
    expected = float((metric * jd.square()).sum().detach()) / (N * eta) + decay
    before = flat(net)
    assert surrogate.curvature(direction) == pytest.approx(expected, rel=1e-10)
    assert torch.equal(flat(net), before)
    product = surrogate.gauss_newton_product(direction)
    assert sum(float((d * b).sum()) for d, b in zip(direction, product, strict=True)) == pytest.approx(
        expected, rel=1e-10
    )


@pytest.mark.parametrize(("linear", "rel"), [(True, 1e-9), (False, 1e-7)])
@pytest.mark.parametrize("divergence", [None, kl_divergence])
def test_curvature_by_differences_equals_that_of_forward_mode(linear, rel, divergence) -> None:
    net = make_net(linear=linear)
    if divergence is not None:
        net = nn.Sequential(net, nn.Softmax(-1))
    decay = [0.1] * len(list(net.parameters()))
    surrogate, _ = surrogate_of(net, squared, 0.7, divergence=divergence, decay=decay)
    surrogate.value()
    gradient, before = surrogate.gradient(), flat(net)
    expected = surrogate.curvature(gradient)
    surrogate.forward_mode = False
    for factor in (1.0, 1e4, 1e-4):  # its length does not matter
        found = surrogate.curvature([factor * g for g in gradient])
        assert found == pytest.approx(factor**2 * expected, rel=rel)
    assert torch.equal(flat(net), before)


class Doubling(torch.autograd.Function):
    """A custom function without forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class WithoutForwardMode(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return Doubling.apply(self.net(x))


def test_networks_without_forward_mode_take_the_same_steps_when_linear() -> None:
    plain, custom = make_net(linear=True), WithoutForwardMode(make_net(linear=True))
    doubled = SSO(plain.parameters(), lr=0.5)
    other = SSO(custom.parameters(), lr=0.5)
    for _ in range(3):
        doubled.step(lambda: (2 * plain(data()), squared))
        other.step(lambda: (custom(data()), squared))
    torch.testing.assert_close(flat(custom), flat(plain), rtol=1e-8, atol=1e-8)
    with pytest.raises(RuntimeError, match="ConjugateGradient needs forward-mode AD"):
        SSO(custom.parameters(), inner="cg").step(lambda: (custom(data()), squared))


# ---- known exact minimisers


def test_one_inner_sgd_step_is_sgd_to_the_bit() -> None:
    ours, theirs = make_net(dtype=torch.float32), make_net(dtype=torch.float32)
    x = data(dtype=torch.float32)
    a = SSO(ours.parameters(), lr=0.7, inner=OptimizerSteps(steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)))
    b = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for _ in range(20):
        a.step(lambda: (ours(x), cross_entropy))
        b.zero_grad()
        cross_entropy(theirs(x)).backward()
        b.step()
        assert torch.equal(flat(ours), flat(theirs))


@pytest.mark.parametrize("inner", [ConjugateGradient, StrongWolfeLBFGS])
def test_exact_steps_on_squared_loss_solve_the_normal_equations(inner) -> None:
    net = make_net(linear=True)
    run(net, squared, 1, lr=1.0, inner=inner(steps=200, tol=1e-12))
    design = torch.cat([data(), torch.ones(N, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, data(3)[:, :K]).solution
    torch.testing.assert_close(torch.cat([net.weight.T, net.bias[None]]), expected, rtol=1e-6, atol=1e-6)


def test_exact_step_of_a_linear_network_is_a_pseudoinverse_step() -> None:
    """θ - η X⁺ g, with fewer examples than parameters: the solution that moves least."""
    net = nn.Linear(30, 1, bias=False).double()
    x = torch.randn(N, 30, dtype=torch.float64)
    start, labels = net.weight.detach().clone(), (torch.arange(N) % 2)[:, None].double()
    z = net(x).detach()
    slopes = z.sigmoid() - labels
    SSO(net.parameters(), lr=1.7, inner=ConjugateGradient(steps=N, tol=1e-14)).step(
        lambda: (net(x), lambda f: functional.binary_cross_entropy_with_logits(f, labels))
    )
    expected = start - 1.7 * (torch.linalg.pinv(x) @ slopes).T
    torch.testing.assert_close(net.weight.detach(), expected, rtol=1e-9, atol=1e-9)


def test_gauss_newton_step_is_an_exact_line_search_on_linear_networks() -> None:
    """The new gradient is orthogonal to the old one, which was the direction."""
    net = make_net(linear=True)
    surrogate, _ = surrogate_of(net, logistic, 0.8)
    surrogate.value()
    before = surrogate.gradient()
    run_once = SSO(net.parameters(), lr=0.8, inner=GaussNewton(steps=1))
    run_once.step(lambda: (net(data()), logistic))
    surrogate.value()
    dot = sum(float((g * h).sum()) for g, h in zip(before, surrogate.gradient(), strict=True))
    assert abs(dot) < 1e-12


def test_kl_with_exact_steps_is_exponentiated_gradient() -> None:
    logits = nn.Parameter(torch.randn(4, K, dtype=torch.float64))
    costs = torch.rand(4, K, dtype=torch.float64)
    p = logits.detach().softmax(1)
    optimizer = SSO([logits], lr=0.5, divergence="kl", inner=StrongWolfeLBFGS(steps=300, tol=1e-12))
    optimizer.step(lambda: (logits.softmax(1), lambda q: (costs * q).sum(1).mean()))
    weights = p * torch.exp(-0.5 * costs)
    torch.testing.assert_close(logits.detach().softmax(1), weights / weights.sum(1, keepdim=True), rtol=1e-6, atol=1e-6)


def test_a_divergence_of_ones_own_equals_the_built_in_one() -> None:
    a, b = make_net(), make_net()
    run(a, squared, 3, lr=0.5)
    run(b, squared, 3, lr=0.5, divergence=lambda f, z: 0.5 * (f - z).square())
    torch.testing.assert_close(flat(a), flat(b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inner", INNER)
def test_full_batch_loss_never_grows_for_eta_up_to_1_over_smoothness(inner) -> None:
    for loss, eta in LOSSES.values():
        losses = run(make_net(), loss, 15, lr=eta, inner=few(inner, 5))
        assert all(b <= a for a, b in pairwise(losses)), losses
        assert losses[-1] < losses[0]


# ---- rules for η


def etas(steps: int, **options) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    """η of each step, and (z, g) with g the gradients of the examples' own losses."""
    net = make_net()
    optimizer, seen, found = SSO(net.parameters(), **options), [], []
    for _ in range(steps):
        z = net(data()).detach().requires_grad_()
        (slope,) = torch.autograd.grad(logistic(z), z)
        seen.append((z.detach(), N * slope))
        optimizer.step(lambda: (net(data()), logistic))
        found.append(optimizer.get_metrics()["eta"])
    return found, seen


def test_schedules() -> None:
    assert etas(3, lr=0.6)[0] == [0.6] * 3
    assert etas(3, lr=0.6, rule="sqrt")[0] == pytest.approx([0.6, 0.6 / 2**0.5, 0.6 / 3**0.5])
    assert etas(3, lr=0.6, rule=Exponential(total_steps=4))[0] == pytest.approx(
        [0.6 * 4 ** (-t / 4) for t in (1, 2, 3)]
    )


def test_names_are_the_rules_with_their_defaults() -> None:
    for name, rule in (("constant", Constant()), ("sqrt", Sqrt()), ("adagrad", AdaGrad()), ("armijo", Armijo())):
        assert etas(3, lr=2.0, rule=name)[0] == etas(3, lr=2.0, rule=rule)[0]


def test_a_rule_of_ones_own() -> None:
    class Halving(StepRule):
        def step_size(self, targets, loss, loss_at, lr, state):
            return lr / 2 ** state["step"], None

    assert etas(3, lr=2.0, rule=Halving())[0] == [1.0, 0.5, 0.25]


def test_default_eta_is_1_over_smoothness() -> None:
    for loss, eta in (("mse", 0.5), ("bce", 4.0), ("ce", 2.0)):
        assert etas(1, lr=None, loss=loss)[0] == [eta]


def test_adagrad_sums_squared_norms() -> None:
    found, seen = etas(4, lr=2.0, rule="adagrad")
    total = 0.0
    for eta, (_, g) in zip(found, seen, strict=True):
        total += float(g.square().sum())
        assert eta == pytest.approx(1 / (math.sqrt(total) / 2.0 + 1e-6))


def test_armijo_takes_the_first_eta_of_its_sequence_that_fulfils_the_condition() -> None:
    found, seen = etas(5, lr=30.0, rule=Armijo(c=0.3, decay=0.8, grow=1.5))
    last = 30.0
    for eta, (z, g) in zip(found, seen, strict=True):

        def fulfils(step: float, z: Tensor = z, g: Tensor = g) -> bool:
            return float(logistic(z - step * g)) <= float(logistic(z)) - 0.3 * step * float(g.square().sum()) / N

        expected = 1.5 * last
        while not fulfils(expected):
            expected *= 0.8
        assert eta == pytest.approx(expected)
        assert fulfils(eta)
        last = eta


def test_armijo_stays_in_its_bounds() -> None:
    assert set(etas(3, lr=30.0, rule=Armijo(bounds=(0.1, 0.2)))[0]) <= {0.2}
    assert etas(1, lr=1e6, rule=Armijo(c=0.999, bounds=(50.0, 60.0)))[0] == [50.0]


def test_newton_metric_makes_the_exact_step_a_newton_step_in_target_space() -> None:
    z = nn.Parameter(torch.randn(N, 1, dtype=torch.float64))
    labels = (torch.arange(N) % 2)[:, None].double()
    p = z.detach().sigmoid()
    expected = z.detach() - 0.5 * (p - labels) / (p * (1 - p) + 1e-5)
    optimizer = SSO([z], lr=0.5, loss="bce", inner=ConjugateGradient(steps=50, tol=1e-14), rule="newton")
    optimizer.step(lambda: (1.0 * z, lambda f: functional.binary_cross_entropy_with_logits(f, labels)))
    torch.testing.assert_close(z.detach(), expected, rtol=1e-9, atol=1e-9)


def test_diagonal_adagrad_keeps_one_accumulator_for_each_example_and_output() -> None:
    z = nn.Parameter(torch.zeros(6, 2, dtype=torch.float64))
    goal = torch.randn(6, 2, dtype=torch.float64)
    optimizer = SSO([z], lr=0.5, inner=ConjugateGradient(steps=50, tol=1e-14), rule=AdaGradPerExample())
    position, table = torch.zeros(6, 2, dtype=torch.float64), torch.zeros(6, 2, dtype=torch.float64)
    for rows in ([0, 1, 2], [2, 3, 0], [5, 0, 1]):
        index = torch.tensor(rows)
        optimizer.step(lambda i=index: (z[i], lambda f: 0.5 * (f - goal[i]).square().sum(1).mean(), i))
        g = position[index] - goal[index]
        table[index] += g.square()
        position[index] -= 0.5 * g / table[index].clamp(1e-5, 1e5).sqrt()
        torch.testing.assert_close(z.detach(), position, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(optimizer.state["sso"]["table"], table)


# ---- the objective


def test_sum_reduction_takes_the_steps_of_the_mean() -> None:
    for rule in ("constant", "armijo", "adagrad"):
        mean, total = make_net(), make_net()
        run(mean, logistic, 4, lr=2.0, rule=rule)
        run(total, lambda z: N * logistic(z), 4, lr=2.0, rule=rule, reduction="sum")
        torch.testing.assert_close(flat(total), flat(mean), rtol=1e-8, atol=1e-8)


def test_maximize_negates_the_loss() -> None:
    for rule in ("constant", "armijo"):
        down, up = make_net(), make_net()
        run(down, logistic, 4, lr=2.0, rule=rule)
        run(up, lambda z: -logistic(z), 4, lr=2.0, rule=rule, maximize=True)
        assert torch.equal(flat(up), flat(down))


def test_weight_decay_is_part_of_the_objective() -> None:
    net = make_net(linear=True)
    run(net, squared, 1, lr=1.0, weight_decay=0.2, inner=ConjugateGradient(steps=100, tol=1e-13))
    design = torch.cat([data(), torch.ones(N, 1, dtype=torch.float64)], 1)
    normal = design.T @ design / N + 0.2 * torch.eye(D + 1, dtype=torch.float64)
    expected = torch.linalg.solve(normal, design.T @ data(3)[:, :K] / N)
    torch.testing.assert_close(torch.cat([net.weight.T, net.bias[None]]), expected, rtol=1e-8, atol=1e-8)


def test_long_target_gradients_are_shortened() -> None:
    z = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    goal = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    optimizer = SSO([z], max_target_grad_norm=1.0, inner=ConjugateGradient(tol=1e-14))
    optimizer.step(lambda: (1.0 * z, lambda f: 0.5 * (f - goal).square().sum(1).mean()))
    torch.testing.assert_close(z.detach(), torch.tensor([[0.6, 0.8], [0.3, 0.4]], dtype=torch.float64))


def test_frozen_and_lr_0_groups_stay() -> None:
    net = make_net()
    net[0].bias.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.0}]
    optimizer = SSO(groups, lr=1.0, weight_decay=0.1)
    optimizer.step(lambda: (net(data()), squared))
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight"}
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"groups may have it or 0, got \[0.5, 1.0\]"):
        optimizer.step(lambda: (net(data()), squared))


# ---- calls and state


@pytest.mark.parametrize("inner", INNER)
def test_loss_fn_is_called_once_a_step(inner) -> None:
    net, calls = make_net(), []

    def loss(z: Tensor) -> Tensor:
        calls.append(z.requires_grad)
        return logistic(z)

    optimizer = SSO(net.parameters(), **INNER[inner])
    for _ in range(3):
        optimizer.step(lambda: (net(data()), loss))
    assert calls == [True] * 3


def test_dropout_and_random_numbers_in_the_closure_repeat_themselves() -> None:
    net = nn.Sequential(nn.Linear(D, 20), nn.Dropout(0.5), nn.Linear(20, K)).double()
    optimizer = SSO(net.parameters(), inner=GaussNewton(steps=5))
    torch.manual_seed(5)
    net(data())
    expected = torch.rand(3)
    torch.manual_seed(5)
    outputs = []
    optimizer.step(lambda: (outputs.append(net(data())) or outputs[-1], squared))
    assert torch.equal(torch.rand(3), expected), "the stream of random numbers moved on by more than one forward pass"
    assert len(outputs) > 5
    torch.manual_seed(5)
    torch.testing.assert_close(net(data()).detach(), outputs[-1].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_skips_the_step(bad, where) -> None:
    net = make_net()
    before, optimizer = flat(net), SSO(net.parameters())
    factor = torch.tensor(bad, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        change = (z - z.detach()).sum()
        extra = factor * squared(z) if where == "loss" else (factor * change).nan_to_num()
        return squared(z) + extra

    with pytest.warns(RuntimeWarning, match="skipped a step"):
        optimizer.step(lambda: (net(data()), loss))
    assert torch.equal(flat(net), before)
    assert optimizer.state["sso"]["step"] == 0
    optimizer.step(lambda: (net(data()), squared))
    assert not torch.equal(flat(net), before)


def test_an_inner_optimizer_that_diverges_is_undone() -> None:
    net = make_net(dtype=torch.float32)
    before = flat(net)
    x, goal = data(dtype=torch.float32), data(3)[:, :K].float()
    optimizer = SSO(net.parameters(), inner=OptimizerSteps(steps=4, optimizer=lambda p: torch.optim.SGD(p, lr=1e30)))
    optimizer.step(lambda: (net(x), lambda z: (z - goal).square().mean()))
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize("rule", ["sqrt", "armijo", "adagrad", "adagrad_per_example"])
@pytest.mark.parametrize("inner", ["gauss_newton", "adam", "callable"])
def test_resumes_to_the_bit(rule, inner) -> None:
    def steps(net: nn.Module, optimizer: SSO, count: int) -> None:
        for _ in range(count):
            optimizer.step(lambda: (net(data()), logistic, torch.arange(N)))

    options = {"lr": 2.0, "rule": rule, "inner": few(inner, 3)}
    net = make_net()
    optimizer = SSO(net.parameters(), **options)
    steps(net, optimizer, 3)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(net, optimizer, 3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make_net()
    resumed = SSO(other.parameters(), **options)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    assert_same(resumed.state_dict(), saved["optimizer"])
    steps(other, resumed, 3)
    assert torch.equal(flat(other), flat(net))


def test_metrics() -> None:
    net = make_net()
    optimizer = SSO(net.parameters(), lr=1.0, inner=GaussNewton(steps=4))
    assert optimizer.get_metrics() == {}
    before = float(optimizer.step(lambda: (net(data()), squared)))
    metrics = optimizer.get_metrics()
    assert metrics["loss"] == pytest.approx(before)
    assert metrics["inner_steps"] == 4
    # for ½|z - y|² and η = 1 the surrogate is the loss
    assert metrics["surrogate_decrease"] == pytest.approx(before - float(squared(net(data()))))


def test_gradients_of_the_parameters_are_left_alone() -> None:
    for inner in INNER.values():
        net = make_net()
        for p in net.parameters():
            p.grad = torch.full_like(p, 7.0)
        SSO(net.parameters(), **inner).step(lambda net=net: (net(data()), squared))
        assert all((p.grad == 7.0).all() for p in net.parameters())


# ---- what it refuses


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda net: (net(data()).detach(), squared), RuntimeError, "targets have no graph"),
        (lambda net: (net(data()), lambda z: z), RuntimeError, "loss_fn must return a scalar"),
        (lambda net: (net(data()), lambda z: 3.0), RuntimeError, "loss_fn must return a scalar tensor, got float"),
        (lambda net: (net(data()), lambda z: squared(z.detach())), RuntimeError, "does not depend differentiably"),
        (lambda net: (net(data()),), TypeError, "must return"),
        (lambda net: (net(data()), 3.0), TypeError, "a tensor and a function"),
        (lambda net: squared(net(data())), RuntimeError, "SSO needs the targets"),
    ],
)
def test_bad_closures(result, error, message) -> None:
    net = make_net()
    with pytest.raises(error, match=message):
        SSO(net.parameters()).step(lambda: result(net))


def test_bad_use_of_rules_and_dimensions() -> None:
    net = make_net()
    with pytest.raises(RuntimeError, match="needs the examples' indices"):
        run(net, squared, 1, rule=AdaGradPerExample())
    with pytest.raises(RuntimeError, match="2 indices for 12 examples"):
        SSO(net.parameters(), rule=AdaGradPerExample()).step(lambda: (net(data()), squared, torch.arange(2)))
    with pytest.raises(ValueError, match=r"num_batch_dims=3 but the targets have shape \(12, 3\)"):
        run(net, squared, 1, num_batch_dims=3)
    with pytest.raises(RuntimeError, match="step was called without a closure"):
        SSO(net.parameters()).step()


def test_targets_that_do_not_depend_on_the_parameters_move_nothing() -> None:
    net, stranger = make_net(), nn.Parameter(torch.ones(N, K, dtype=torch.float64))
    before = flat(net)
    SSO(net.parameters()).step(lambda: (1.0 * stranger, squared))
    assert torch.equal(flat(net), before)


# ---- arguments of version 0.0


def test_former_arguments_warn_and_mean_the_same() -> None:
    for former, new in (
        ({"inner_steps": 3, "inner_tol": 0.0}, {"inner": GaussNewton(steps=3, tol=0.0)}),
        ({"inner": "cg", "inner_steps": 4}, {"inner": ConjugateGradient(steps=4)}),
        ({"inner": "armijo", "inner_lr": 5.0, "inner_grow": 1.5}, {"inner": ArmijoDescent(lr=5.0, grow=1.5)}),
        ({"rule": "armijo", "armijo_c": 0.3, "eta_bounds": (0.1, 9.0)}, {"rule": Armijo(c=0.3, bounds=(0.1, 9.0))}),
        ({"rule": "exponential", "total_steps": 9}, {"rule": Exponential(total_steps=9)}),
        ({"inner": "sgd", "inner_lr": 0.05}, {"inner": functools.partial(torch.optim.SGD, lr=0.05)}),
    ):
        old_net, new_net = make_net(), make_net()
        with pytest.warns(FutureWarning, match=f"SSO's {min(former.keys() - {'inner', 'rule'})}"):
            run(old_net, squared, 2, lr=0.5, **former)
        run(new_net, squared, 2, lr=0.5, **new)
        assert torch.equal(flat(old_net), flat(new_net)), former


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussNewton(steps=0), "steps must be an integer >= 1, got 0"),
        (lambda: GaussNewton(tol=-1.0), "tol must be >= 0 and finite, got -1.0"),
        (lambda: ConjugateGradient(armijo_c=1.0), r"armijo_c must be in \(0, 1\), got 1.0"),
        (lambda: ArmijoDescent(lr=math.inf), "lr must be > 0 and finite, got inf"),
        (lambda: ArmijoDescent(grow=0.5), "grow must be >= 1 and finite, got 0.5"),
        (lambda: OptimizerSteps(sync_every=0), "sync_every must be an integer >= 1, got 0"),
        (lambda: Armijo(c=0.0), r"c must be in \(0, 1\), got 0.0"),
        (lambda: Armijo(decay=1.0), r"decay must be in \(0, 1\), got 1.0"),
        (lambda: Armijo(bounds=(2.0, 1.0)), "bounds must be 0 < least <= greatest"),
        (lambda: AdaGradPerExample(bounds=(0.0, 1.0)), "bounds must be 0 < least <= greatest"),
        (lambda: Newton(damping=0.0), "damping must be > 0 and finite, got 0.0"),
        (lambda: Exponential(total_steps=0), "total_steps must be an integer >= 1, got 0"),
    ],
)
def test_solvers_and_rules_refuse_bad_settings_by_name(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_group_cannot_have_a_setting_of_the_optimizer() -> None:
    with pytest.raises(ValueError, match="rule is no setting of a parameter group"):
        SSO([{"params": list(make_net().parameters()), "rule": "armijo"}])


def test_a_lasting_inner_optimizer_resumes_after_a_group_was_added() -> None:
    def start() -> tuple[nn.Module, SSO]:
        net = make_net()
        return net, SSO(net[0].parameters(), lr=2.0, inner=OptimizerSteps(steps=3))

    net, optimizer = start()
    step = lambda n, o: o.step(lambda: (n(data()), logistic))  # noqa: E731
    step(net, optimizer)
    optimizer.add_param_group({"params": list(net[2].parameters())})
    step(net, optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    step(net, optimizer)

    other, resumed = start()
    resumed.add_param_group({"params": list(other[2].parameters())})
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    step(other, resumed)
    assert torch.equal(flat(other), flat(net))
    assert_same(resumed.state_dict(), optimizer.state_dict(), "state")


@pytest.mark.parametrize("inner", ["gauss_newton", "cg", "lbfgs", "armijo", "adam"])
def test_a_solver_reports_the_surrogate_before_and_after(inner) -> None:
    net = make_net()
    surrogate, _ = surrogate_of(net, squared, 0.7, decay=[0.1] * len(list(net.parameters())))
    start, solver = surrogate.value(graph=False), inner_solver(inner)
    result = solver.solve(surrogate, 3, {}, solver.prepare([list(net.parameters())]))
    assert start > 0
    assert result.before == pytest.approx(start, rel=1e-12)
    assert result.after == pytest.approx(surrogate.value(graph=False), rel=1e-12)
    assert result.after < result.before


def test_conjugate_gradients_fall_back_to_a_gradient_step() -> None:
    """Where the network curves so much that the Gauss-Newton step overshoots."""
    w = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    z, slope = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    surrogate = TargetSurrogate(lambda: [w + 100 * w**3], [w], [z], [slope], 1.0, 1.0)
    result = inner_solver("cg").solve(surrogate, 1, {}, None)
    assert result.before == 0
    assert result.after == pytest.approx(surrogate.value(graph=False))
    assert result.after < 0
    assert float(w.detach()) == pytest.approx(-result.step_size)  # the gradient there is 1


@pytest.mark.parametrize("rule", [Armijo, AdaGradPerExample])
def test_bounds_may_leave_one_value(rule) -> None:
    assert rule(bounds=(0.5, 0.5)).bounds == (0.5, 0.5)
    for bounds in ((0.0, 0.5), (0.5, 0.4)):
        with pytest.raises(ValueError, match="bounds"):
            rule(bounds=bounds)
