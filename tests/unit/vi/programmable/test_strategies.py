"""Gradient estimators against enumeration and closed forms."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Gamma, Geometric, Independent, Normal, Poisson

from lit_methods.vi.programmable import (
    ENUM,
    MVD,
    REINFORCE,
    REPARAM,
    MovingAverage,
    Strategy,
    check_gradient,
    elbo,
    iwelbo,
    objective,
    observe,
    sample,
    variance_report,
)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def leaf(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


@objective
def nested(p, q, *data):
    trace, _, _ = q.simulate(*data)
    return trace["x"] ** 2 + 3 * trace["b"] * trace["c"]


def nested_program(grad_b, grad_c, grad_x):
    values = {"p": 0.3, "q1": 0.6, "q0": 0.2, "m1": 1.2, "m0": -0.4, "sg": 0.7}
    theta = {name: leaf(value) for name, value in values.items()}

    def run() -> None:
        b = sample("b", Bernoulli(theta["p"]), grad=grad_b)
        c = sample("c", Bernoulli(torch.where(b > 0, theta["q1"], theta["q0"])), grad=grad_c)
        sample("x", Normal(torch.where(b > 0, theta["m1"], theta["m0"]) + c, theta["sg"]), grad=grad_x)

    return run, list(theta.values())


@pytest.mark.parametrize(
    ("grad_b", "grad_c", "grad_x"),
    list(itertools.product([ENUM, MVD, REINFORCE(baseline=1.5)], [ENUM, MVD, REINFORCE()], [REPARAM, REINFORCE()])),
    ids=lambda strategy: type(strategy).__name__,
)
def test_every_mix_of_strategies_is_unbiased(grad_b, grad_c, grad_x) -> None:
    run, theta = nested_program(grad_b, grad_c, grad_x)
    exact = torch.tensor([5.08, 1.92, 0.14, 1.08, -0.28, 1.4, 2.214])
    estimates = []
    for _ in range(25):
        estimate = nested(run, run)(num_samples=400)
        torch.testing.assert_close(estimate.surrogate, estimate.value, rtol=0, atol=1e-12)
        estimates.append(torch.stack([*torch.autograd.grad(estimate.surrogate, theta), estimate.value]))
    found = torch.stack(estimates)
    assert ((found.mean(0) - exact).abs() <= 4.5 * found.std(0) / 5).all()


def test_enumeration_leaves_no_variance_of_discrete_choices() -> None:
    run, theta = nested_program(ENUM, ENUM, REPARAM)

    @objective
    def discrete(p, q):
        trace, _, _ = q.simulate()
        return 3 * trace["b"] * trace["c"] + trace["b"]

    for _ in range(3):
        estimate = discrete(run, run)()
        assert estimate.value.item() == pytest.approx(3 * 0.3 * 0.6 + 0.3, abs=1e-12)
        gradient = torch.autograd.grad(estimate.surrogate, theta[:3], materialize_grads=True, allow_unused=True)
        torch.testing.assert_close(torch.stack(gradient), torch.tensor([3 * 0.6 + 1, 0.9, 0.0]), rtol=0, atol=1e-12)


def test_one_draw_of_reinforce_has_both_terms() -> None:
    mu, log_sd = leaf(0.3), leaf(0.1)

    class Fixed(Normal):
        has_rsample = False

        def sample(self, sample_shape=()):
            return torch.tensor(1.1)

    def guide() -> None:
        sample("x", Fixed(mu, log_sd.exp()))

    @objective
    def cost(p, q):
        trace, log_q, _ = q.simulate()
        return 2 * Normal(0.0, 1.0).log_prob(trace["x"]) - log_q

    gradient = torch.autograd.grad(cost(guide, guide)().surrogate, [mu, log_sd])
    torch.testing.assert_close(torch.stack(gradient), torch.tensor([-1.812306, 1.317100]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grad", [ENUM, MVD, REINFORCE(baseline=-2.0), "auto"], ids=["enum", "mvd", "score", "auto"])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_choices_under_a_logarithm_of_a_sum_are_unbiased(grad, num_particles) -> None:
    logit, logit2 = leaf(0.4), leaf(-0.2)

    def model() -> None:
        b = sample("b", Bernoulli(0.3))
        c = sample("c", Bernoulli(0.2 + 0.5 * b))
        observe("y", Normal(b + 2 * c, 1.0), 1.3)

    def guide() -> None:
        b = sample("b", Bernoulli(logits=logit), grad=grad)
        sample("c", Bernoulli(logits=logit2 + b), grad="auto" if grad == "auto" else grad)

    check = check_gradient(
        iwelbo(model, guide, num_particles=num_particles), [logit, logit2], num_samples=20, num_repeats=80
    )
    assert check.unbiased, check
    # brute force over all joint draws of the particles
    log_w = []
    for b, c in itertools.product([0.0, 1.0], repeat=2):
        b, c = torch.tensor(b), torch.tensor(c)
        log_q = Bernoulli(logits=logit).log_prob(b) + Bernoulli(logits=logit2 + b).log_prob(c)
        log_p = Bernoulli(0.3).log_prob(b) + Bernoulli(0.2 + 0.5 * b).log_prob(c)
        log_w.append((log_q, log_p + Normal(b + 2 * c, 1.0).log_prob(torch.tensor(1.3)) - log_q))
    bound = torch.zeros(())
    for draws in itertools.product(log_w, repeat=num_particles):
        weight = torch.stack([q for q, _ in draws]).sum().exp()
        bound = bound + weight * (torch.stack([w for _, w in draws]).logsumexp(0) - math.log(num_particles))
    exact = torch.stack(torch.autograd.grad(bound, [logit, logit2]))
    torch.testing.assert_close(check.exact, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("baseline", [None, 3.0, -7.0, torch.tensor(2.0), "leave_one_out"], ids=str)
def test_baselines_leave_the_mean(baseline) -> None:
    logits = torch.tensor([0.1, 0.5, -0.3], requires_grad=True)

    def guide() -> None:
        sample("k", Categorical(logits=logits), grad=REINFORCE(baseline=baseline))

    @objective
    def cost(p, q):
        trace, log_q, _ = q.simulate()
        return 5 + trace["k"] ** 2 - log_q

    check = check_gradient(cost(guide, guide), [logits], num_samples=20, num_repeats=300)
    assert check.unbiased, check
    if baseline == "leave_one_out":
        plain = REINFORCE()

        def without() -> None:
            sample("k", Categorical(logits=logits), grad=plain)

        worse = check_gradient(cost(without, without), [logits], num_samples=20, num_repeats=300)
        assert check.standard_error.square().sum() < 0.5 * worse.standard_error.square().sum()


def test_check_gradient_finds_a_biased_estimator() -> None:
    logit = leaf(0.3)

    class Careless(Strategy):
        def draw(self, dist, ctx):
            value = dist.sample(ctx.shape)
            return value, value

    def guide() -> None:
        sample("b", Bernoulli(logits=logit), grad=Careless())

    @objective
    def cost(p, q):
        trace, log_q, _ = q.simulate()
        return 4 * trace["b"] - log_q

    assert not check_gradient(cost(guide, guide), [logit], num_samples=20, num_repeats=50).unbiased


def test_check_gradient_refuses_what_cannot_be_enumerated() -> None:
    mu = leaf(0.0)

    def guide() -> None:
        sample("x", Normal(mu, 1.0))

    with pytest.raises(ValueError, match="site 'x' must not be ENUM for Normal"):
        check_gradient(elbo(guide, guide), [mu])


def test_a_strategy_of_ones_own_may_branch() -> None:
    """Antithetic pairs: both signs of a normal draw, averaged."""
    mu = leaf(0.5)

    class Antithetic(Strategy):
        def draw(self, dist, ctx):
            noise = torch.randn(ctx.shape)
            value = ctx.branch(dist.loc + dist.scale * torch.stack([noise, -noise]), 0)
            return value, value

        def combine(self, value, surrogate, site):
            average = [x.mean(0) if x.ndim == site.dim else x for x in (value, surrogate)]
            return average[0], average[1]

    def guide() -> None:
        sample("x", Normal(mu, 1.0), grad=Antithetic())

    @objective
    def linear(p, q):
        return 3 * q.simulate()[0]["x"]

    estimate = linear(guide, guide)(num_samples=5)
    assert estimate.value.item() == pytest.approx(1.5)
    assert torch.autograd.grad(estimate.surrogate, mu)[0].item() == pytest.approx(3.0)


def test_noise_is_shared_by_branches() -> None:
    p = leaf(0.4)

    def guide() -> None:
        b = sample("b", Bernoulli(p), grad=ENUM)
        sample("x", Independent(Normal(torch.stack([b, -b], -1), 1.0), 1))

    seen = []

    @objective
    def cost(p, q):
        trace, _, _ = q.simulate()
        seen.append(trace["x"] - torch.stack([trace["b"], -trace["b"]], -1))
        return trace["x"].sum(-1)

    cost(guide, guide)(num_samples=7)
    assert seen[0].shape == (2, 7, 2)
    torch.testing.assert_close(seen[0][0], seen[0][1])


def test_impossible_branches_count_as_nothing() -> None:
    logits = torch.tensor([0.0, -math.inf, 1.0], requires_grad=True)

    def guide() -> None:
        sample("k", Categorical(logits=logits), grad=ENUM)

    def model() -> None:
        k = sample("k", Categorical(torch.tensor([0.2, 0.3, 0.5])))
        observe("y", Normal(k.double(), 1.0), 0.7)

    estimate = elbo(model, guide)()
    (gradient,) = torch.autograd.grad(estimate.surrogate, logits)
    assert torch.isfinite(estimate.value)
    assert torch.isfinite(gradient).all()
    assert gradient[1] == 0


class TestBaselineNetworks:
    def test_learns_the_cost_and_keeps_gradients_apart(self) -> None:
        net, feature = nn.Linear(2, 1), nn.Linear(3, 2)
        data = torch.randn(6, 3)

        class Value(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, h: Tensor) -> Tensor:
                return self.net(h).squeeze(-1)

        value = Value()

        def guide(x: Tensor) -> None:
            h = feature(x)
            sample("b", Bernoulli(logits=h.sum(-1)), grad=REINFORCE(value, inputs=(h,)))

        @objective
        def cost(p, q, x):
            trace, log_q, _ = q.simulate(x)
            return 2 * trace["b"] + 1e3 - log_q

        estimate = cost(guide, guide)(data, batch_shape=(6,), num_samples=3)
        own = torch.autograd.grad(
            estimate.baseline_loss, [*net.parameters(), *feature.parameters()], allow_unused=True, retain_graph=True
        )
        assert [g is not None for g in own] == [True, True, False, False]
        guides = torch.autograd.grad(
            estimate.surrogate.mean(), [*net.parameters(), *feature.parameters()], allow_unused=True
        )
        assert [g is not None for g in guides] == [False, False, True, True]
        # the target is a problem's own cost: the same for more problems and more samples
        for batch, samples in ((6, 3), (2, 1), (6, 10)):
            estimate = cost(guide, guide)(data[:batch], batch_shape=(batch,), num_samples=samples)
            assert estimate.baseline_loss.item() == pytest.approx(1e6, rel=0.02)

    def test_shape_must_be_that_of_the_problems(self) -> None:
        def guide(x: Tensor) -> None:
            sample("b", Bernoulli(logits=x), grad=REINFORCE(torch.zeros(6, 1)))

        with pytest.raises(ValueError, match=r"baseline of site 'b' must have the shape \[6\], got \[6, 1\]"):
            elbo(guide, guide)(torch.zeros(6), batch_shape=(6,))

    def test_moving_average(self) -> None:
        average = MovingAverage(decay=0.5)

        def guide() -> None:
            sample("b", Bernoulli(torch.tensor(0.5)), grad=REINFORCE(average))

        @objective
        def cost(p, q, value):
            return value + 0 * q.simulate(value)[0]["b"]

        for value, expected in ((4.0, 4.0), (8.0, 6.0)):
            cost(lambda v: guide(), lambda v: guide())(torch.tensor(value), num_samples=4, chunk_size=4)
            assert average.average.item() == expected
        average.eval()
        cost(lambda v: guide(), lambda v: guide())(torch.tensor(100.0))
        assert average.average.item() == 6.0


def test_variance_report_names_the_noisy_site() -> None:
    mu, logit = leaf(0.0), leaf(0.0)

    def guide() -> None:
        sample("calm", Normal(mu, 1.0))
        sample("noisy", Bernoulli(logits=logit), grad=REINFORCE())

    @objective
    def cost(p, q):
        trace, _, _ = q.simulate()
        return trace["calm"] + 50 + trace["noisy"]

    report = variance_report(cost(guide, guide), [mu, logit], num_samples=4)
    assert list(report) == ["total", "noisy", "calm"] or list(report) == ["noisy", "total", "calm"]
    assert report["noisy"].strategy == "Reinforce"
    assert report["calm"].variance == pytest.approx(0, abs=1e-20)
    assert report["calm"].norm == pytest.approx(1)
    assert report["noisy"].variance == pytest.approx(0.25 * 50.5**2 / 4, rel=0.5)


@pytest.mark.parametrize(
    ("dist", "grad", "message"),
    [
        (Poisson(2.0), ENUM, "grad of site 'k' must not be ENUM for Poisson"),
        (Geometric(0.5), ENUM, "grad of site 'k' must not be ENUM for Geometric"),
        (Independent(Bernoulli(torch.full((3,), 0.5)), 1), ENUM, "must not be ENUM for Independent"),
        (Normal(0.0, 1.0), MVD, "grad of site 'k' must not be MVD for Normal"),
        (Categorical(torch.ones(3)), MVD, "must not be MVD for Categorical"),
        (Bernoulli(0.5), REPARAM, "grad of site 'k' must not be REPARAM for Bernoulli"),
        (Bernoulli(0.5), "reparam", "grad of site 'k' must be 'auto', REPARAM"),
        (Bernoulli(0.5), REINFORCE("leave_one_out"), "num_samples must be >= 2 for the leave_one_out baseline"),
    ],
)
def test_strategies_refuse_distributions_by_name(dist, grad, message) -> None:
    def guide() -> None:
        sample("k", dist, grad=grad)

    with pytest.raises(ValueError, match=message):
        elbo(guide, guide)()


def test_bad_baselines() -> None:
    with pytest.raises(ValueError, match="baseline must be 'leave_one_out'"):
        REINFORCE(baseline="loo")
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        MovingAverage(1.0)


def test_implicit_reparameterisation() -> None:
    a = leaf(2.0)

    def guide() -> None:
        sample("g", Gamma(a, 1.0))

    @objective
    def mean(p, q):
        return q.simulate()[0]["g"]

    gradients = [torch.autograd.grad(mean(guide, guide)(num_samples=2000).surrogate, a)[0] for _ in range(5)]
    assert torch.stack(gradients).mean().item() == pytest.approx(1.0, abs=0.05)
