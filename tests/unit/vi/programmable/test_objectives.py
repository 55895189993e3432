"""Objectives against closed forms, and what users of other packages have stumbled over."""

import itertools
import math
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Beta, Categorical, Independent, Normal, Uniform

from lit_methods.vi.programmable import (
    ENUM,
    MVD,
    REINFORCE,
    check_gradient,
    elbo,
    forward_kl,
    iwelbo,
    log_weights,
    normalize,
    objective,
    observe,
    program,
    renyi,
    reweighted_wake_sleep,
    sample,
    symmetric,
    vimco,
    wake_p,
    wake_q,
)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def leaf(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


class Drawn(Normal):
    """A normal distribution with noise of our choice."""

    def __init__(self, loc, scale, noise) -> None:
        super().__init__(loc, scale)
        self.noise = torch.as_tensor(noise)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise


def gaussian_model(x: Tensor) -> None:
    z = sample("z", Normal(0.0, 1.0))
    observe("x", Normal(z, 1.0), x)


# exact answers


def test_an_exact_guide_has_no_variance_and_gives_the_evidence() -> None:
    x = torch.tensor([0.3, -1.0, 2.0])

    def guide(x: Tensor) -> None:
        sample("z", Normal(x / 2, math.sqrt(0.5)))

    evidence = Normal(0.0, math.sqrt(2)).log_prob(x)
    for make in (elbo, iwelbo, renyi):
        for _ in range(2):
            value = make(gaussian_model, guide)(x, batch_shape=(3,), num_samples=2).value
            torch.testing.assert_close(value, evidence, rtol=0, atol=1e-12)


def test_beta_bernoulli_evidence() -> None:
    flips = torch.tensor([1.0] * 6 + [0.0] * 4)

    def model() -> None:
        theta = sample("theta", Beta(10.0, 10.0))
        observe("flips", Independent(Bernoulli(theta.unsqueeze(-1).expand(*theta.shape, 10)), 1), flips)

    def guide() -> None:
        sample("theta", Beta(16.0, 14.0))

    value = elbo(model, guide)(num_samples=50).value
    assert value.item() == pytest.approx(-7.06937, abs=1e-5)


def test_iwelbo_grows_with_particles_to_the_evidence() -> None:
    x = torch.tensor(1.5)

    def guide(x: Tensor) -> None:
        sample("z", Normal(0.2, 1.3))

    with torch.no_grad():
        values = [
            iwelbo(gaussian_model, guide, num_particles=n)(x, num_samples=4000).value.item() for n in (1, 2, 8, 200)
        ]
    evidence = Normal(0.0, math.sqrt(2)).log_prob(x).item()
    assert values == sorted(values)
    assert evidence - 0.02 < values[-1] < evidence + 0.01


@pytest.mark.parametrize("seed", range(2))
def test_one_particle_is_the_elbo(seed) -> None:
    x = torch.tensor([0.5, 1.0])

    def guide(x: Tensor) -> None:
        sample("z", Normal(0.3 * x, 0.8))

    found = []
    for make in (elbo, lambda p, q: iwelbo(p, q, num_particles=1), lambda p, q: renyi(p, q, num_particles=1)):
        torch.manual_seed(seed)
        found.append(make(gaussian_model, guide)(x, batch_shape=(2,)).value)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-14)


def test_logarithm_of_a_sum_over_particles_is_taken_for_each_problem() -> None:
    """Numbers of the card: two data, N = 2, each by quadrature."""

    def guide(x: Tensor) -> None:
        sample("z", Normal(torch.where(x < 0, 0.0, 0.3), torch.where(x < 0, 1.0, 0.8)))

    x = torch.tensor([-1.0, 0.5])
    with torch.no_grad():
        value = iwelbo(gaussian_model, guide, num_particles=2)(x, batch_shape=(2,), num_samples=200_000).value
    torch.testing.assert_close(value, torch.tensor([-1.653474, -1.336022]), rtol=0, atol=0.005)


def test_a_batch_equals_its_problems_one_by_one_with_the_same_noise() -> None:
    x, noise = torch.randn(4), torch.randn(3, 4)
    for make in (iwelbo, renyi):

        def guide(x: Tensor, noise: Tensor) -> None:
            sample("z", Drawn(0.3 * x, 0.8, noise))

        def model(x: Tensor, noise: Tensor) -> None:
            gaussian_model(x)

        together = make(model, guide, num_particles=3)(x, noise, batch_shape=(4,)).value
        alone = [make(model, guide, num_particles=3)(x[i], noise[:, i]).value for i in range(4)]
        torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-12)


def test_importance_weights_are_differentiated_as_they_should() -> None:
    m, log_s = leaf(0.3), leaf(math.log(0.8))

    def guide(x: Tensor) -> None:
        sample("z", Drawn(m, log_s.exp(), torch.tensor([-1.0, 0.2, 1.5])))

    estimate = iwelbo(gaussian_model, guide, num_particles=3)(torch.tensor(0.5))
    assert estimate.value.item() == pytest.approx(-1.362699, abs=1e-6)
    gradient = torch.stack(torch.autograd.grad(estimate.surrogate, [m, log_s]))
    torch.testing.assert_close(gradient, torch.tensor([-0.240117, -0.221998]), rtol=0, atol=1e-6)


def test_minibatches_are_scaled_once() -> None:
    data = torch.tensor([-0.5, 0.2, 0.9, 1.4, -0.1])
    q = leaf(0.4)

    def model(x: Tensor, scale: float) -> None:
        b = sample("b", Bernoulli(0.5))
        observe("x", Independent(Normal(b.unsqueeze(-1).expand(*b.shape, len(x)), 1.0), 1), x, scale=scale)

    for grad in (ENUM, REINFORCE(baseline=-6.0)):

        def guide(x: Tensor, scale: float) -> None:
            sample("b", Bernoulli(q), grad=grad)  # noqa: B023

        bound = elbo(model, guide)
        samples = 1 if grad is ENUM else 3000
        parts = [(data[list(pair)], 2.5) for pair in itertools.combinations(range(5), 2)]
        for batches in (parts, [(data, 1.0)]):
            estimates = [bound(*batch, num_samples=samples) for batch in batches]
            value = sum(e.value for e in estimates) / len(batches)
            gradient = torch.autograd.grad(sum(e.surrogate for e in estimates) / len(batches), q)[0]
            assert value.item() == pytest.approx(-6.389828, abs=1e-6 if grad is ENUM else 0.1)
            assert gradient.item() == pytest.approx(-0.194535, abs=1e-6 if grad is ENUM else 0.15)


def test_vimco_is_unbiased_and_calmer() -> None:
    logit = leaf(0.4)

    def model() -> None:
        b = sample("b", Bernoulli(0.3))
        observe("y", Normal(b, 1.0), 1.3)

    def guide() -> None:
        sample("b", Bernoulli(logits=logit))

    checks = [
        check_gradient(make(model, guide, num_particles=4), [logit], num_samples=10, num_repeats=300)
        for make in (iwelbo, vimco)
    ]
    assert checks[1].exact.item() == pytest.approx(checks[0].exact.item(), abs=1e-12)
    assert all(check.unbiased for check in checks)
    assert checks[1].standard_error < 0.5 * checks[0].standard_error

    def branching() -> None:
        sample("b", Bernoulli(logits=logit), grad=ENUM)

    with pytest.raises(ValueError, match="site 'b' must not branch"):
        vimco(model, branching, num_particles=3)()
    with pytest.raises(ValueError, match="site 'b' must not have a baseline of its own"):
        vimco(model, lambda: sample("b", Bernoulli(logits=logit), grad=REINFORCE(1.0)), num_particles=3)()


def test_renyi_of_order_zero_is_the_iwelbo_and_one_is_refused() -> None:
    def guide(x: Tensor) -> None:
        sample("z", Normal(0.3, 0.8))

    values = []
    for make in (iwelbo, lambda p, q, **k: renyi(p, q, alpha=0.0, **k)):
        torch.manual_seed(3)
        values.append(make(gaussian_model, guide, num_particles=4)(torch.tensor(0.5)).value)
    torch.testing.assert_close(*values, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="alpha must not be 1, got 1"):
        renyi(gaussian_model, guide, alpha=1)(torch.tensor(0.5))


# wake and sleep


def wake_sleep_parts():
    theta, phi = leaf(0.5), leaf(0.1)

    def model(x: Tensor) -> None:
        z = sample("z", Bernoulli(logits=theta))
        observe("x", Normal(2 * z, 1.0), x)

    def guide(x: Tensor) -> None:
        sample("z", Bernoulli(logits=phi * x))

    return model, guide, theta, phi


@pytest.mark.parametrize(
    ("make", "of_model", "of_guide"),
    [(wake_q, False, True), (wake_p, True, False), (forward_kl, False, True), (reweighted_wake_sleep, True, True)],
)
def test_wake_and_sleep_train_their_own_part(make, of_model, of_guide) -> None:
    model, guide, theta, phi = wake_sleep_parts()
    surrogate = make(model, guide)(torch.tensor([0.4, 1.0]), batch_shape=(2,)).surrogate.mean()
    gradients = torch.autograd.grad(surrogate, [theta, phi], allow_unused=True)
    assert [g is not None for g in gradients] == [of_model, of_guide]


def test_wake_phases_approach_the_posterior_gradients() -> None:
    model, guide, theta, phi = wake_sleep_parts()
    x = torch.tensor(0.4)
    joint = torch.stack([Bernoulli(logits=theta).log_prob(z) + Normal(2 * z, 1.0).log_prob(x) for z in torch.eye(2)[0]])
    posterior = joint.detach().softmax(0)[0]  # of z = 1
    exact = [posterior - theta.sigmoid(), (posterior - (phi * x).sigmoid()) * x]
    surrogate = reweighted_wake_sleep(model, guide, num_particles=2000)(x, num_samples=20).surrogate
    gradients = torch.stack(torch.autograd.grad(surrogate, [theta, phi]))
    torch.testing.assert_close(gradients, torch.stack(exact).detach(), rtol=0, atol=0.02)


def test_sleep_trains_on_draws_of_the_model() -> None:
    model, guide, theta, phi = wake_sleep_parts()
    surrogate = forward_kl(model, guide)(torch.zeros(20_000), batch_shape=(20_000,)).surrogate.mean()
    z = (torch.rand(1_000_000) < theta.detach().sigmoid()).double()
    x = 2 * z + torch.randn(len(z))
    exact = ((z - (phi.detach() * x).sigmoid()) * x).mean()
    torch.testing.assert_close(torch.autograd.grad(surrogate, phi)[0], exact, rtol=0, atol=0.04)


def test_symmetric_is_the_sum_of_its_parts() -> None:
    model, guide, theta, phi = wake_sleep_parts()
    x = torch.tensor(0.4)
    exact = sum(
        check_gradient(make(model, guide), [theta, phi], x, num_repeats=2).exact
        for make in (elbo, lambda p, q: wake_q(p, q, num_particles=3))
    )
    both = check_gradient(symmetric(model, guide, num_particles=3), [theta, phi], x, num_samples=20, num_repeats=50)
    torch.testing.assert_close(both.exact, exact, rtol=0, atol=1e-12)
    assert both.unbiased


def test_a_resampled_guide_is_no_worse_and_differentiable() -> None:
    model, guide, theta, phi = wake_sleep_parts()
    x = torch.tensor(0.4)
    values = []
    for n in (1, 2, 4):
        resampled = normalize(model, guide, n)
        check = check_gradient(elbo(model, resampled), [theta, phi], x, num_samples=20, num_repeats=60)
        assert check.unbiased, (n, check)
        values.append(elbo(model, resampled)(x, num_samples=4000).value.item())
    assert values == sorted(values)
    bound = iwelbo(model, guide, num_particles=4)(x, num_samples=4000).value.item()
    assert values[-1] == pytest.approx(bound, abs=0.02)
    by_score = normalize(model, guide, 3, grad=REINFORCE())
    assert check_gradient(elbo(model, by_score), [theta, phi], x, num_samples=20, num_repeats=60).unbiased


# shapes


def test_an_observation_that_broadcasts_to_a_square_is_refused() -> None:
    logits = torch.zeros(100)

    def model(x: Tensor) -> None:
        observe("x", Bernoulli(logits=logits), x)

    for samples in (1, 2, 100):
        with pytest.raises(ValueError, match=r"site 'x' must have.*Independent\(dist, 1\)|before its event dimensions"):
            elbo(model, lambda x: None)(torch.ones(100, 1), batch_shape=(100,), num_samples=samples)
    estimate = elbo(model, lambda x: None)(torch.ones(100), batch_shape=(100,))
    assert estimate.value.sum().item() == pytest.approx(-69.314718, abs=1e-5)


def test_event_dimensions_must_be_told() -> None:
    def model(x: Tensor) -> None:
        z = sample("z", Normal(torch.zeros(5, 3), 1.0))
        observe("x", Normal(z, 1.0), x)

    with pytest.raises(ValueError, match=r"distribution of site 'z' must have a batch shape .*Independent\(dist, 1\)"):
        elbo(model, model)(torch.zeros(5, 3), batch_shape=(5,))


def test_as_many_particles_as_problems_is_no_square() -> None:
    def guide(x: Tensor) -> None:
        sample("z", Normal(torch.zeros(5), 1.0))

    value = iwelbo(gaussian_model, guide, num_particles=5)(torch.zeros(5), batch_shape=(5,)).value
    assert value.shape == (5,)


def test_objectives_must_return_one_number_a_problem() -> None:
    @objective
    def summed(p, q, x):
        return torch.zeros(3, 2)

    with pytest.raises(ValueError, match=r"objective summed\(\) must return one number a problem"):
        summed(gaussian_model, gaussian_model)(torch.zeros(2), batch_shape=(2,))


# infinities


def test_some_particles_outside_the_support_are_no_error_and_all_are() -> None:
    a = leaf(1.0)

    def model() -> None:
        sample("z", Uniform(0.0, 1.0, validate_args=False))

    def guide() -> None:
        sample("z", Drawn(torch.tensor([0.5, 3.0]) * a, torch.tensor(0.5), torch.tensor([0.1, 0.2])))

    estimate = iwelbo(model, guide, num_particles=2)()
    (gradient,) = torch.autograd.grad(estimate.surrogate, a)
    assert torch.isfinite(estimate.value)
    assert torch.isfinite(gradient)

    def outside() -> None:
        sample("z", Drawn(torch.tensor([2.5, 3.0]) * a, torch.tensor(0.5), torch.tensor([0.1, 0.2])))

    with pytest.raises(ValueError, match=r"site 'z' has a log-probability of -inf.*clamp"):
        iwelbo(model, outside, num_particles=2)()


def test_a_boundary_of_beta_is_finite() -> None:
    def model() -> None:
        observe("x", Beta(1.0, 1.0, validate_args=False), torch.tensor(0.0))

    assert elbo(model, lambda: None)().value.item() == 0.0


@pytest.mark.parametrize("default", [True, False])  # torch.compile turns it off
def test_values_outside_the_support_name_the_site(monkeypatch: pytest.MonkeyPatch, default: bool) -> None:
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", default)

    def model() -> None:
        observe("x", Beta(2.0, 2.0), torch.tensor(1.5))

    with pytest.raises(ValueError, match="value of site 'x' must suit Beta"):
        elbo(model, lambda: None)()


# enumeration has limits


def test_too_many_branches_are_refused_before_anything_is_allocated() -> None:
    def guide() -> None:
        for i in range(70):
            sample(f"b{i}", Bernoulli(0.5), grad=ENUM)

    message = r"max_branches must be >= the product of branches, 8192 at site 'b12'.*grad=REINFORCE\(\)"
    with pytest.raises(ValueError, match=message):
        elbo(guide, guide)()


def test_chunks_give_the_same_as_their_parts() -> None:
    mu, logit = leaf(0.3), leaf(0.2)
    x = torch.randn(3)

    def guide(x: Tensor) -> None:
        sample("z", Normal(mu * x, 1.0))
        sample("b", Bernoulli(logits=logit), grad=REINFORCE("leave_one_out"))

    def model(x: Tensor) -> None:
        z = sample("z", Normal(0.0, 1.0))
        b = sample("b", Bernoulli(0.5))
        observe("x", Normal(z + b, 1.0), x)

    bound = iwelbo(model, guide, num_particles=2)
    torch.manual_seed(5)
    whole = bound(x, batch_shape=(3,), num_samples=8, chunk_size=4)
    gradient = torch.stack(torch.autograd.grad(whole.surrogate.mean(), [mu, logit]))
    torch.manual_seed(5)
    parts = [bound(x, batch_shape=(3,), num_samples=4) for _ in range(2)]
    surrogate = sum(part.surrogate for part in parts).mean() / 2
    torch.testing.assert_close(whole.value, sum(part.value for part in parts) / 2, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, torch.stack(torch.autograd.grad(surrogate, [mu, logit])), rtol=0, atol=1e-10)


# objects


def test_evaluation_without_gradients_has_the_same_value() -> None:
    logit, mu = leaf(0.3), leaf(0.1)

    def guide() -> None:
        a = sample("a", Bernoulli(logits=logit), grad=ENUM)
        b = sample("b", Bernoulli(logits=logit + a), grad=MVD)
        sample("c", Bernoulli(logits=logit + b))
        sample("x", Normal(mu + a, 1.0))

    def model() -> None:
        for name in "abc":
            sample(name, Bernoulli(0.5))
        sample("x", Normal(0.0, 1.0))

    for make in (elbo, lambda p, q: iwelbo(p, q, num_particles=2)):
        torch.manual_seed(1)
        value = make(model, guide)(num_samples=3).value
        torch.manual_seed(1)
        with torch.no_grad():
            assert torch.equal(make(model, guide)(num_samples=3).value, value)


def test_objectives_keep_no_state() -> None:
    model, guide, *_ = wake_sleep_parts()
    other_model, other_guide = program(gaussian_model), program(lambda x: sample("z", Normal(0.3, 0.8)))
    bounds = [elbo(model, guide), elbo(other_model, other_guide)]

    def run(bound):
        torch.manual_seed(2)
        return bound(torch.tensor(0.4), num_samples=3).value

    alone = [run(bound) for bound in bounds]
    assert [run(bounds[i]) for i in (1, 0, 1, 0)] == [alone[1], alone[0], alone[1], alone[0]]


def test_threads_do_not_disturb_each_other() -> None:
    """Each thread has an evaluation of its own, even in the midst of another's."""
    outcomes = []

    def guide(x: Tensor) -> None:
        thread = threading.Thread(
            target=lambda: outcomes.append(elbo(gaussian_model, lambda x: sample("z", Normal(0.0, 1.0)))(x))
        )
        thread.start()
        thread.join()
        sample("z", Normal(0.0, 1.0))

    elbo(gaussian_model, guide)(torch.tensor(0.1), num_samples=3)
    assert len(outcomes) == 1


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_particles must be >= 1, got 0"):
        iwelbo(gaussian_model, gaussian_model, num_particles=0)
    with pytest.raises(ValueError, match=r"settings of elbo must be among \[\], got \['alpha'\]"):
        elbo(gaussian_model, gaussian_model, alpha=2)
    with pytest.raises(ValueError, match="num_particles must be >= 2, got 1"):
        vimco(gaussian_model, gaussian_model, num_particles=1)(torch.tensor(0.0))
    for name in ("num_samples", "chunk_size", "max_branches"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            elbo(gaussian_model, gaussian_model)(torch.tensor(0.0), **{name: 0})


def test_an_objective_of_ones_own_with_settings() -> None:
    @objective
    def chi(p, q, x, *, num_particles=4):
        return 0.5 * (2 * log_weights(p, q, num_particles, x)).logsumexp(0)

    value = chi(gaussian_model, lambda x: sample("z", Normal(0.3, 0.8)), num_particles=3)(
        torch.zeros(2), batch_shape=(2,)
    )
    assert value.value.shape == (2,)


def test_double_and_bfloat16_networks() -> None:
    torch.set_default_dtype(torch.float32)
    encoder, decoder = nn.Linear(6, 4), nn.Linear(2, 6)
    x = torch.rand(8, 6).round()

    def model(x: Tensor) -> None:
        z = sample("z", Independent(Normal(torch.zeros(2), 1.0), 1))
        observe("x", Independent(Bernoulli(logits=decoder(z)), 1), x)

    def guide(x: Tensor) -> None:
        loc, scale = encoder(x).chunk(2, -1)
        sample("z", Independent(Normal(loc, scale.exp()), 1))

    bound = iwelbo(model, guide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        estimate = bound(x, batch_shape=(8,), num_samples=2)
    assert estimate.value.dtype == torch.float32
    estimate.surrogate.mean().backward()
    encoder.double()
    decoder.double()
    assert bound(x.double(), batch_shape=(8,)).value.dtype == torch.float64


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_estimates_equal_eager_ones(backend) -> None:
    logit = leaf(0.3)

    def guide(x: Tensor) -> None:
        sample("b", Bernoulli(logits=logit * x), grad=ENUM)

    def model(x: Tensor) -> None:
        b = sample("b", Bernoulli(0.3))
        observe("x", Normal(b, 1.0), x)

    x = torch.randn(4)
    bound = elbo(model, guide)

    def loss(x: Tensor) -> Tensor:
        return bound(x, batch_shape=(4,)).surrogate.mean()

    expected = torch.autograd.grad(loss(x), logit)[0]
    compiled = torch.compile(loss, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), logit)[0], expected, rtol=0, atol=1e-12)


def test_categorical_posterior_by_enumeration() -> None:
    logits = torch.zeros(3, requires_grad=True)
    prior = torch.tensor([0.2, 0.3, 0.5])
    target = Normal(torch.arange(3.0), 1.0).log_prob(torch.tensor(1.8)) + prior.log()

    def model() -> None:
        k = sample("k", Categorical(prior))
        observe("y", Normal(k.double(), 1.0), 1.8)

    def guide() -> None:
        sample("k", Categorical(logits=logits), grad=ENUM)

    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -elbo(model, guide)().surrogate
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.softmax(0), target.softmax(0), rtol=0, atol=1e-6)
    assert elbo(model, guide)().value.item() == pytest.approx(target.logsumexp(0).item(), abs=1e-10)
