"""Traces, names, marginals and normalisation, against enumeration."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent, Normal

from lit_methods.vi.programmable import (
    ENUM,
    MVD,
    REINFORCE,
    SIR,
    Enumeration,
    batched,
    check_gradient,
    cond,
    diwhvi,
    elbo,
    hvi,
    iwelbo,
    iwhvi,
    marginal,
    normalize,
    objective,
    observe,
    program,
    sample,
)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


LOGIT = torch.tensor([0.3, -0.4, 1.1])


def chain() -> None:
    """A -> k -> b, all discrete."""
    a = sample("a", Bernoulli(0.3))
    k = sample("k", Categorical(torch.stack([1 - 0.5 * a, 0.2 + 0.6 * a, 0.3 + 0 * a], -1)))
    sample("b", Bernoulli(logits=LOGIT[k.long()] + a))


def exact_density(**values: float) -> Tensor:
    """Log-density of chain's values, others summed out."""
    terms = []
    for a, k, b in itertools.product((0.0, 1.0), (0, 1, 2), (0.0, 1.0)):
        if all({"a": a, "k": k, "b": b}[name] == value for name, value in values.items()):
            trace = {"a": torch.tensor(a), "k": torch.tensor(k), "b": torch.tensor(b)}
            terms.append(program(chain).log_density(trace))
    return torch.stack(terms).logsumexp(0)


def test_simulation_is_exact_for_a_function() -> None:
    with batched((500,)):
        trace, log_w, value = program(chain).simulate()
        torch.testing.assert_close(program(chain).log_density(trace), log_w, rtol=0, atol=1e-12)
    assert value is None
    assert list(trace) == ["a", "k", "b"]
    assert log_w.shape == (500,)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("proposal", [False, True])
def test_marginals_are_unbiased_in_their_own_directions(num_particles, proposal) -> None:
    def guess(kept, *args) -> None:
        a = sample("a", Bernoulli(0.6))
        a, b = torch.broadcast_tensors(a, kept["b"])
        sample("k", Categorical(torch.stack([1.0 + 0 * a, 1.0 + b, 0.5 + a], -1)))

    target = marginal(chain, ["b"], SIR(num_particles, guess if proposal else None))
    with batched((60_000,)):
        for b in (0.0, 1.0):
            ratio = (target.log_density({"b": torch.full((60_000,), b)}) - exact_density(b=b)).exp()
            assert ratio.mean().item() == pytest.approx(1, abs=4.5 * ratio.std().item() / math.sqrt(60_000))
        trace, log_w, _ = target.simulate()
        for b in (0.0, 1.0):
            chosen = trace["b"] == b
            assert chosen.double().mean().item() == pytest.approx(exact_density(b=b).exp().item(), abs=0.01)
            ratio = (exact_density(b=b) - log_w[chosen]).exp()
            assert ratio.mean().item() == pytest.approx(1, abs=4.5 * ratio.std().item() / math.sqrt(len(ratio)))
        over = (log_w - torch.where(trace["b"] == 1, exact_density(b=1.0), exact_density(b=0.0))).mean()
        assert over > 0  # over-estimated, so that a bound with this guide stays one


def test_marginal_with_the_exact_conditional_as_proposal_is_exact() -> None:
    def conditional(kept, *args) -> None:
        a = sample("a", Bernoulli((exact_density(a=1.0, b=1.0) - exact_density(b=1.0)).exp()), grad=ENUM)
        rows = [[exact_density(a=i, k=k, b=1.0) for k in range(3)] for i in (0.0, 1.0)]
        logits = torch.stack([torch.stack(row) for row in rows])
        sample("k", Categorical(logits=logits[a.long()]), grad=ENUM)

    @objective
    def density(p, q):
        return q.log_density({"b": torch.tensor(1.0)})

    for m in (1, 2):
        exact = marginal(chain, ["b"], SIR(m, conditional))
        value = density(exact, exact)().value
        torch.testing.assert_close(value, exact_density(b=1.0), rtol=0, atol=1e-12)


def test_enumeration_is_exact() -> None:
    for keep in (["b"], ["k"], ["a", "b"]):
        target = marginal(chain, keep, Enumeration())
        with batched((50,)):
            trace, log_w, _ = target.simulate()
        for i in range(50):
            exact = exact_density(**{name: float(trace[name][i]) for name in keep})
            torch.testing.assert_close(log_w[i], exact, rtol=0, atol=1e-12)


def test_enumeration_has_a_limit_and_wants_finite_supports() -> None:
    def many() -> None:
        for i in range(14):
            sample(f"b{i}", Bernoulli(0.5))

    with pytest.raises(ValueError, match="max_branches must be >= 8192 for site 'b13'"):
        marginal(many, ["b0"], Enumeration()).log_density({"b0": torch.tensor(0.0)})

    def normal() -> None:
        sample("x", Normal(sample("z", Normal(0.0, 1.0)), 1.0))

    with pytest.raises(ValueError, match="site 'z' must not be ENUM for Normal"):
        marginal(normal, ["x"], Enumeration()).log_density({"x": torch.tensor(0.0)})


@pytest.mark.parametrize("grad", [ENUM, MVD, REINFORCE()], ids=lambda g: type(g).__name__)
@pytest.mark.parametrize(
    "bound", [lambda p, q: hvi(p, q, ["b"]), lambda p, q: iwhvi(p, q, ["b"], 2), lambda p, q: diwhvi(p, q, ["b"], 2, 2)]
)
def test_hierarchical_bounds_have_unbiased_gradients(grad, bound) -> None:
    logit, weight = torch.tensor(0.2, requires_grad=True), torch.tensor(0.7, requires_grad=True)

    def guide() -> None:
        u = sample("u", Bernoulli(logits=logit), grad=grad)
        sample("b", Bernoulli(logits=weight * (2 * u - 1)), grad=grad)

    def model() -> None:
        b = sample("b", Bernoulli(0.3))
        observe("y", Normal(b, 1.0), 1.0)

    check = check_gradient(bound(model, guide), [logit, weight], num_samples=10, num_repeats=50)
    assert check.unbiased, check
    evidence = torch.tensor([0.7, 0.3]).log() + Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(torch.tensor(1.0))
    assert bound(model, guide)(num_samples=500).value < evidence.logsumexp(0)


def test_doubly_weighted_bound_becomes_that_of_the_marginal() -> None:
    def guide() -> None:
        u = sample("u", Bernoulli(0.4))
        sample("b", Bernoulli(0.3 + 0.5 * u))

    def plain() -> None:
        sample("b", Bernoulli(0.5))  # its marginal

    def model() -> None:
        observe("y", Normal(sample("b", Bernoulli(0.3)), 1.0), 1.0)

    values = [diwhvi(model, guide, ["b"], 3, m)(num_samples=3000).value.item() for m in (1, 300)]
    target = iwelbo(model, plain, num_particles=3)(num_samples=3000).value.item()
    assert values[0] < values[1]
    assert values[1] == pytest.approx(target, abs=0.015)


@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_density_of_resampling_equals_its_enumerated_law(num_particles) -> None:
    prior, likelihood = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([1.0, 0.1, 2.0])
    proposal = torch.tensor([0.5, 0.3, 0.2])

    def target() -> None:
        k = sample("k", Categorical(prior))
        observe("y", Normal(0.0, 1.0 / (likelihood[k.long()] * math.sqrt(2 * math.pi))), 0.0)

    def guess() -> None:
        sample("k", Categorical(proposal), grad=ENUM)

    weights = prior * likelihood / proposal
    law = torch.zeros(3)
    for draw in itertools.product(range(3), repeat=num_particles):
        chosen = weights[list(draw)] / weights[list(draw)].sum()
        for i, k in enumerate(draw):
            law[k] += proposal[list(draw)].prod() * chosen[i]
    resampled = normalize(target, guess, num_particles)

    @objective
    def density(p, q, k):
        return q.log_density({"k": torch.tensor(k)}).exp()

    found = torch.stack([density(resampled, resampled)(k).value for k in range(3)])
    torch.testing.assert_close(found, law, rtol=0, atol=1e-12)
    assert found.sum().item() == pytest.approx(1)

    with batched((100_000,)):
        trace, log_w, _ = resampled.simulate()
    for k in range(3):
        chosen = trace["k"] == k
        assert chosen.double().mean().item() == pytest.approx(law[k].item(), abs=0.01)
        ratio = (law[k].log() - log_w[chosen]).exp()
        assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / math.sqrt(len(ratio)) + 1e-12)


def test_resampling_picks_whole_traces() -> None:
    def guide() -> None:
        a = sample("a", Normal(0.0, 1.0))
        sample("v", Independent(Normal(torch.stack([a, 2 * a], -1), 1e-12), 1))

    with batched((6,), num_samples=4):
        trace, log_w, _ = normalize(guide, guide, 3).simulate()
    assert trace["v"].shape == (4, 6, 2)
    assert log_w.shape == (4, 6)
    torch.testing.assert_close(trace["v"], torch.stack([trace["a"], 2 * trace["a"]], -1), rtol=0, atol=1e-10)


def test_log_evidence_estimate() -> None:
    def target() -> None:
        observe("y", Normal(sample("z", Normal(0.0, 1.0)), 1.0), 0.7)

    def posterior() -> None:
        sample("z", Normal(0.35, math.sqrt(0.5)))

    with batched((3,)):
        found = normalize(target, posterior, 4).log_evidence_estimate()
    exact = Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(0.7))
    torch.testing.assert_close(found, exact.expand(3), rtol=0, atol=1e-12)


def test_nested_programs() -> None:
    """A marginal whose proposal is itself a resampled program."""

    def full() -> None:
        a = sample("a", Bernoulli(0.3))
        sample("b", Bernoulli(0.2 + 0.6 * a))

    def conditioned(kept) -> None:
        a = sample("a", Bernoulli(0.3))
        observe("b", Bernoulli(0.2 + 0.6 * a), kept["b"])

    def prior(kept) -> None:
        sample("a", Bernoulli(0.5))

    target = marginal(full, ["b"], SIR(2, normalize(conditioned, prior, 3)))
    exact = 0.2 * 0.7 + 0.8 * 0.3
    with batched((60_000,)):
        ratio = target.log_density({"b": torch.ones(60_000)}).exp() / exact
        assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / math.sqrt(60_000))
        trace, log_w, _ = target.simulate()
        ratio = exact * (-log_w[trace["b"] == 1]).exp()
        assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / math.sqrt(len(ratio)))


def test_cond_counts_sites_where_they_are_chosen() -> None:
    logit = torch.tensor(0.3, requires_grad=True)

    def guide() -> None:
        b = sample("b", Bernoulli(logits=logit), grad=ENUM)
        cond(b > 0, lambda: sample("x", Bernoulli(0.2), grad=ENUM), lambda: sample("y", Bernoulli(0.9), grad=ENUM))

    def model() -> None:
        b = sample("b", Bernoulli(0.4))
        x = cond(b > 0, lambda: sample("x", Bernoulli(0.5)), lambda: 2 + sample("y", Bernoulli(0.5)))
        observe("z", Normal(x, 1.0), 1.0)

    evidence = 0.0
    for b, value in itertools.product((0, 1), (0, 1)):
        x = value if b else 2 + value
        evidence += (0.4 if b else 0.6) * 0.5 * math.exp(Normal(0.0, 1.0).log_prob(torch.tensor(x - 1.0)))
    bound = elbo(model, guide)().value.item()
    q = torch.sigmoid(logit).item()
    exact = 0.0
    for b, value in itertools.product((0, 1), (0, 1)):
        own = (q if b else 1 - q) * ((0.2 if b else 0.9) if value else (0.8 if b else 0.1))
        x = value if b else 2 + value
        joint = (0.4 if b else 0.6) * 0.5 * math.exp(Normal(0.0, 1.0).log_prob(torch.tensor(x - 1.0)))
        exact += own * (math.log(joint) - math.log(own))
    assert bound == pytest.approx(exact, abs=1e-12)
    assert bound < math.log(evidence)


def test_generate_and_predict() -> None:
    def model(data):
        z = sample("z", Normal(0.0, 1.0))
        return observe("y", Independent(Normal(z.unsqueeze(-1).expand(*z.shape, 2), 0.1), 1), data)

    data = torch.zeros(5, 2)
    with batched((5,)):
        choices, observations = program(model).generate(data)
        assert observations["y"].shape == (5, 2)
        assert not torch.equal(observations["y"], data)
        drawn, observed, value = program(model).predict({"z": torch.full((5,), 7.0)}, data)
    assert list(choices) == ["z"]
    assert torch.equal(drawn["y"], value)
    assert torch.equal(observed["y"], data)
    assert (drawn["y"] - 7).abs().max() < 1


# mistakes


def only(name: str):
    return lambda: sample(name, Normal(0.0, 1.0))


def test_model_and_guide_must_have_the_same_sites() -> None:
    def both() -> None:
        sample("a", Normal(0.0, 1.0))
        sample("b", Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"site 'b' must be in the trace, which has \['a'\].*\['a', 'b'\]"):
        elbo(both, only("a"))()
    with pytest.raises(ValueError, match=r"trace must hold the sites \['a'\].*\['b'\] too; auxiliary.*marginal"):
        elbo(only("a"), both)()


def test_names_are_used_once() -> None:
    def loop() -> None:
        for _ in range(2):
            sample("x", Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="name must be used once in a program, got 'x' again"):
        elbo(loop, loop)()

    def observed_too() -> None:
        sample("x", Normal(0.0, 1.0))
        observe("x", Normal(0.0, 1.0), 1.0)

    with pytest.raises(ValueError, match="name must be used once"):
        elbo(observed_too, only("x"))()


def test_same_site_of_another_shape_names_both() -> None:
    def pair() -> None:
        sample("x", Independent(Normal(torch.zeros(3), 1.0), 1))

    def triple() -> None:
        sample("x", Independent(Normal(torch.zeros(2), 1.0), 1))

    with pytest.raises(ValueError, match=r"value of site 'x' must end in the event shape \[3\].*got \[2\]"):
        elbo(pair, triple)()


def test_keep_must_name_sites() -> None:
    with pytest.raises(ValueError, match=r"keep must name sites of the program, \['a', 'k', 'b'\], got \['c'\] too"):
        marginal(chain, ["b", "c"]).simulate()
    with pytest.raises(ValueError, match="keep must be a list of site names"):
        marginal(chain, [])
    with pytest.raises(ValueError, match=r"trace must hold the sites that are kept, \['b'\], got \['a'\]"):
        marginal(chain, ["b"]).log_density({"a": torch.tensor(0.0)})
    with pytest.raises(ValueError, match=r"program must be a function or module unless algorithm=SIR"):
        marginal(normalize(chain, chain), ["b"])


@pytest.mark.parametrize("make", [SIR, lambda n: normalize(chain, chain, n)])
def test_num_particles(make) -> None:
    with pytest.raises(ValueError, match="num_particles must be >= 1, got 0"):
        make(0)


def test_sites_outside_programs() -> None:
    with pytest.raises(RuntimeError, match=r"sample\('x'\) was called outside a program"):
        sample("x", Normal(0.0, 1.0))
    with pytest.raises(RuntimeError, match=r"observe\('x'\) was called outside a program"):
        observe("x", Normal(0.0, 1.0), 1.0)


def test_other_mistakes() -> None:
    with pytest.raises(ValueError, match="function must be callable, got 3"):
        program(3)
    with pytest.raises(ValueError, match=r"dist of site 'x' must be a torch.distributions.Distribution, got float"):
        elbo(lambda: sample("x", 1.0), chain)()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale of site 'y' must be > 0, got 0"):
        program(lambda: observe("y", Normal(0.0, 1.0), 0.0, scale=0)).simulate()
    with pytest.raises(ValueError, match="num_samples must be >= 1, got 0"), batched((), num_samples=0):
        pass
