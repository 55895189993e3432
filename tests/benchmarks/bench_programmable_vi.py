"""Steps of programmable VI beside hand-written torch, Pyro and NumPyro; and the variance of gradients.

Run ``python -m tests.benchmarks.bench_programmable_vi [section ...]``; sections: vae, objectives, sites, numpyro,
variance.
On a CPU by processor time of one thread (numpyro: by the clock). Pyro runs without validation, as its users time it.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.nn import functional

from lit_methods.batches import SupervisedBatch
from lit_methods.vi.programmable import (
    ENUM,
    MVD,
    REINFORCE,
    elbo,
    iwelbo,
    observe,
    renyi,
    reweighted_wake_sleep,
    sample,
    vimco,
)
from lit_methods.vi.programmable.examples import VAEGuide, VAEModel
from tests.benchmarks import harness

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time
PACKAGES = ("lit-methods", "pyro-ppl", "numpyro", "jax")
pyro: Any = harness.peer("pyro")


def vae_parts(batch: int) -> tuple[VAEModel, VAEGuide, SupervisedBatch]:
    torch.manual_seed(0)
    x = torch.rand(batch, 1, 28, 28, device=DEVICE).round()
    labels = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    return VAEModel().to(DEVICE), VAEGuide().to(DEVICE), SupervisedBatch(x, labels)


def ours(objective: Any, batch: SupervisedBatch, parts: list[nn.Module], compiled: bool = False) -> harness.Work:
    """A gradient of the mean over the batch, on parameters without gradients before."""
    shape = (len(batch.x),)

    def loss() -> Tensor:
        return -objective(batch, batch_shape=shape).surrogate.mean()

    loss = torch.compile(loss) if compiled else loss

    def step() -> None:
        for part in parts:
            part.zero_grad()
        loss().backward()

    return step


def by_hand(model: VAEModel, guide: VAEGuide, batch: SupervisedBatch, distributions: bool) -> harness.Work:
    """What one writes without a library: the same estimator, by formulas or by torch.distributions."""
    x = batch.x.flatten(1)

    def step() -> None:
        model.zero_grad()
        guide.zero_grad()
        loc, scale = guide.encoder(x).chunk(2, -1)
        scale = functional.softplus(scale)
        if distributions:
            q = Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)
            z = q.rsample()
            prior = Independent(
                Normal(torch.zeros_like(z), torch.ones_like(z), validate_args=False), 1, validate_args=False
            )
            pixels = Bernoulli(logits=model.decoder(z), validate_args=False)
            bound = Independent(pixels, 1, validate_args=False).log_prob(x) + prior.log_prob(z) - q.log_prob(z)
        else:
            noise = torch.randn_like(loc)
            z = loc + scale * noise
            log_q = -(scale.log() + 0.5 * noise.square()).sum(-1)
            log_p = -0.5 * z.square().sum(-1)
            likelihood = functional.binary_cross_entropy_with_logits(model.decoder(z), x, reduction="none").sum(-1)
            bound = log_p - likelihood - log_q
        (-bound.mean()).backward()

    return step


def _pyro_vae(model: VAEModel, guide: VAEGuide, batch: SupervisedBatch, loss: Any) -> harness.Work:
    dist = pyro.distributions
    pyro.clear_param_store()
    x = batch.x.flatten(1)
    zeros, ones = x.new_zeros(len(x), 10), x.new_ones(len(x), 10)

    def pyro_model(x: Tensor) -> None:
        pyro.module("decoder", model.decoder)  # without it Pyro takes no gradient
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros, ones).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=model.decoder(z)).to_event(1), obs=x)

    def pyro_guide(x: Tensor) -> None:
        pyro.module("encoder", guide.encoder)
        loc, scale = guide.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, functional.softplus(scale)).to_event(1))

    def step() -> None:
        model.zero_grad()
        guide.zero_grad()
        loss.loss_and_grads(pyro_model, pyro_guide, x)

    return step


def vae() -> None:
    """The paper's table 1: a gradient of the ELBO, networks 784-200-20 and 10-200-784."""
    for batch in (64, 128, 256, 512, 1024):
        model, guide, data = vae_parts(batch)
        parts: list[nn.Module] = [model, guide]
        contenders = {
            "torch by hand": by_hand(model, guide, data, False),
            "torch.distributions by hand": by_hand(model, guide, data, True),
            "ours": ours(elbo(model, guide), data, parts),
        }
        if pyro is not None:
            pyro.enable_validation(False)
            contenders["Pyro Trace_ELBO"] = _pyro_vae(model, guide, data, pyro.infer.Trace_ELBO())
        seconds = harness.alternate(contenders, rounds=15, warmup=3, inner=3, clock=CLOCK)
        harness.save("programmable_vi", f"vae, B={batch}", harness.ratios(seconds, "torch by hand"), PACKAGES)


def objectives() -> None:
    """Bounds of several particles on the same networks, 64 images, 5 particles; and enumeration."""
    model, guide, data = vae_parts(64)
    parts: list[nn.Module] = [model, guide]
    pairs: dict[str, tuple[harness.Work, harness.Work | None]] = {
        "IWELBO": (ours(iwelbo(model, guide, num_particles=5), data, parts), None),
        "Renyi": (ours(renyi(model, guide, alpha=0.5, num_particles=5), data, parts), None),
        "reweighted wake-sleep": (ours(reweighted_wake_sleep(model, guide, num_particles=5), data, parts), None),
    }
    enumerated, their_enumerated = _mixture()
    pairs["enumerated mixture"] = (enumerated, their_enumerated)
    if pyro is not None:
        pyro.enable_validation(False)
        infer = pyro.infer
        renyi_loss = infer.RenyiELBO(alpha=0.5, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
        iwae_loss = infer.RenyiELBO(alpha=0.0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
        rws_loss = infer.ReweightedWakeSleep(
            num_particles=5, insomnia=1.0, vectorize_particles=True, max_plate_nesting=1
        )
        pairs["IWELBO"] = (pairs["IWELBO"][0], _pyro_vae(model, guide, data, iwae_loss))
        pairs["Renyi"] = (pairs["Renyi"][0], _pyro_vae(model, guide, data, renyi_loss))
        name = "reweighted wake-sleep"
        pairs[name] = (pairs[name][0], _pyro_vae(model, guide, data, rws_loss))
    for name, (own, theirs) in pairs.items():
        contenders = {"ours": own} | ({} if theirs is None else {"Pyro": theirs})
        seconds = harness.alternate(contenders, rounds=15, warmup=3, inner=3, clock=CLOCK)
        harness.save("programmable_vi", f"{name}, B=64", harness.ratios(seconds, "ours"), PACKAGES)


def _mixture() -> tuple[harness.Work, harness.Work | None]:
    """Two binary choices of the guide for each of 64 data, enumerated: ours in the guide, Pyro's in the guide too."""
    torch.manual_seed(0)
    x = torch.randn(64, device=DEVICE)
    logits = nn.Linear(1, 2).to(DEVICE)
    data = SupervisedBatch(x, x)

    def model(batch: SupervisedBatch) -> None:
        a = sample("a", Bernoulli(0.3, validate_args=False))
        b = sample("b", Bernoulli(0.6, validate_args=False))
        observe("x", Normal(a + 2 * b, 1.0, validate_args=False), batch.x)

    def guide(batch: SupervisedBatch) -> None:
        first, second = logits(batch.x.unsqueeze(-1)).unbind(-1)
        a = sample("a", Bernoulli(logits=first, validate_args=False), grad=ENUM)
        sample("b", Bernoulli(logits=second + a, validate_args=False), grad=ENUM)

    own = ours(elbo(model, guide), data, [logits])
    if pyro is None:
        return own, None
    dist = pyro.distributions

    def pyro_model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.3)))
            b = pyro.sample("b", dist.Bernoulli(x.new_tensor(0.6)))
            pyro.sample("x", dist.Normal(a + 2 * b, 1.0), obs=x)

    @pyro.infer.config_enumerate
    def pyro_guide(x: Tensor) -> None:
        pyro.module("logits", logits)
        first, second = logits(x.unsqueeze(-1)).unbind(-1)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(logits=first))
            pyro.sample("b", dist.Bernoulli(logits=second + a))

    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)

    def step() -> None:
        logits.zero_grad()
        loss.loss_and_grads(pyro_model, pyro_guide, x)

    return own, step


def sites() -> None:
    """What one more site costs: a chain of normal choices of 4 numbers, the time of 21 less that of 1, by 20."""
    rows = []
    data = SupervisedBatch(torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE))

    def chain(n: int) -> dict[str, harness.Work]:
        locs = nn.ParameterList([torch.zeros(4, device=DEVICE) for _ in range(n)])
        one = torch.ones((), device=DEVICE)

        def model(batch: SupervisedBatch) -> None:
            x: Any = torch.zeros(4, device=DEVICE)
            for i in range(n):
                x = sample(f"x{i}", Normal(x, one, validate_args=False))

        def guide(batch: SupervisedBatch) -> None:
            for i in range(n):
                sample(f"x{i}", Normal(locs[i], one, validate_args=False))

        def by_hand() -> None:
            locs.zero_grad()
            xs, log_q = [], 0.0
            for loc in locs:
                q = Normal(loc, one, validate_args=False)
                xs.append(q.rsample())
                log_q = log_q + q.log_prob(xs[-1])
            x, log_p = torch.zeros(4, device=DEVICE), 0.0
            for value in xs:
                log_p = log_p + Normal(x, one, validate_args=False).log_prob(value)
                x = value
            (-(log_p - log_q).mean()).backward()

        works: dict[str, harness.Work] = {
            "torch.distributions by hand": by_hand, "ours": ours(elbo(model, guide), data, [locs])
        }  # fmt: skip
        if pyro is not None:
            pyro.enable_validation(False)
            dist = pyro.distributions

            def pyro_model() -> None:
                x: Any = torch.zeros(4, device=DEVICE)
                with pyro.plate("data", 4):
                    for i in range(n):
                        x = pyro.sample(f"x{i}", dist.Normal(x, one))

            def pyro_guide() -> None:
                pyro.module(f"locs{n}", locs)
                with pyro.plate("data", 4):
                    for i in range(n):
                        pyro.sample(f"x{i}", dist.Normal(locs[i], one))

            loss = pyro.infer.Trace_ELBO()

            def step() -> None:
                locs.zero_grad()
                loss.loss_and_grads(pyro_model, pyro_guide)

            works["Pyro Trace_ELBO"] = step
        return works

    few, many = chain(1), chain(21)
    contenders = {f"{name}, {n}": work for n, works in ((1, few), (21, many)) for name, work in works.items()}
    seconds = harness.alternate(contenders, rounds=15, warmup=3, inner=3, clock=CLOCK)
    each = {
        name: [(b - a) / 20 for a, b in zip(seconds[f"{name}, 1"], seconds[f"{name}, 21"], strict=True)] for name in few
    }
    hand = each["torch.distributions by hand"]
    rows = harness.ratios(each, "torch.distributions by hand")
    over = {name: [t - h for t, h in zip(times, hand, strict=True)] for name, times in each.items()}
    for row in rows:
        row["overhead_us"] = round(1e6 * sorted(over[row["name"]])[len(hand) // 2], 1)
    harness.save("programmable_vi", "one more site (model and guide)", rows, PACKAGES)


def numpyro() -> None:
    """The same gradient by NumPyro, compiled: by the clock, with compile time apart; one thread for both."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")  # before jax is imported
    jax: Any = harness.peer("jax")
    peer: Any = harness.peer("numpyro")
    rows: list[harness.Row] = []
    for batch in (64, 256):
        model, guide, data = vae_parts(batch)
        own = ours(elbo(model, guide), data, [model, guide])
        contenders: dict[str, harness.Work] = {"ours": own}
        compile_seconds = 0.0
        if peer is not None:
            work, compile_seconds = _numpyro_vae(jax, peer, model, guide, data)
            contenders["NumPyro, jit"] = work
        seconds = harness.alternate(contenders, rounds=15, warmup=3, inner=3)
        for row in harness.ratios(seconds, "ours"):
            more = {"compile_s": round(compile_seconds, 2)} if row["name"] != "ours" else {}
            rows.append({**row, "B": batch, **more})
    harness.save("programmable_vi", "NumPyro, by the clock", rows, PACKAGES)


def _numpyro_vae(
    jax: Any, peer: Any, model: VAEModel, guide: VAEGuide, data: SupervisedBatch
) -> tuple[Callable[[], object], float]:
    dist, jnp = peer.distributions, jax.numpy
    params = {
        f"{name}.{i}.{kind}": jnp.asarray(getattr(net[i], kind).detach().numpy())
        for name, net in (("encoder", guide.encoder), ("decoder", model.decoder))
        for i in (0, 2)
        for kind in ("weight", "bias")
    }
    x = jnp.asarray(data.x.flatten(1).numpy())

    def network(name: str, params: Any, x: Any) -> Any:
        hidden = jax.nn.leaky_relu(x @ params[f"{name}.0.weight"].T + params[f"{name}.0.bias"])
        return hidden @ params[f"{name}.2.weight"].T + params[f"{name}.2.bias"]

    def parameters() -> Any:
        return {name: peer.param(name, value) for name, value in params.items()}

    def their_model(x: Any) -> None:
        own = parameters()
        with peer.plate("data", len(x)):
            z = peer.sample("z", dist.Normal(jnp.zeros(10), jnp.ones(10)).to_event(1))
            peer.sample("x", dist.Bernoulli(logits=network("decoder", own, z)).to_event(1), obs=x)

    def their_guide(x: Any) -> None:
        loc, scale = jnp.split(network("encoder", parameters(), x), 2, -1)
        with peer.plate("data", len(x)):
            peer.sample("z", dist.Normal(loc, jax.nn.softplus(scale)).to_event(1))

    loss = peer.infer.Trace_ELBO()
    gradient = jax.jit(jax.grad(lambda params, key: loss.loss(key, params, their_model, their_guide, x)))
    key = jax.random.PRNGKey(0)
    start = time.perf_counter()
    jax.block_until_ready(gradient(params, key))
    return lambda: jax.block_until_ready(gradient(params, key)), time.perf_counter() - start


def variance() -> None:
    """Summed variance of one gradient of the same bound for one datum, 500 draws: a binary and a normal choice."""
    torch.manual_seed(0)
    holder = nn.ParameterList([torch.tensor(0.3), torch.tensor(0.2)])
    parameters = list(holder)
    logit, loc = parameters

    def model(batch: Tensor) -> None:
        b = sample("b", Bernoulli(0.3))
        z = sample("z", Normal(0.0, 1.0))
        observe("x", Normal(z + 2 * b, 1.0), batch)

    def guide_of(grad: Any) -> Callable[[Tensor], None]:
        def guide(batch: Tensor) -> None:
            b = sample("b", Bernoulli(logits=logit), grad=grad)
            sample("z", Normal(loc - b, 0.8))

        return guide

    x = torch.tensor(1.3)
    estimators: dict[str, Callable[[], list[Tensor]]] = {}
    for name, bound in {
        "ours, ELBO, REINFORCE": elbo(model, guide_of(REINFORCE())),
        "ours, ELBO, MVD": elbo(model, guide_of(MVD)),
        "ours, ELBO, ENUM": elbo(model, guide_of(ENUM)),
        "ours, IWELBO of 5, REINFORCE": iwelbo(model, guide_of(REINFORCE()), num_particles=5),
        "ours, IWELBO of 5, VIMCO": vimco(model, guide_of(REINFORCE()), num_particles=5),
        "ours, IWELBO of 5, MVD": iwelbo(model, guide_of(MVD), num_particles=5),
    }.items():
        estimators[name] = lambda bound=bound: list(torch.autograd.grad(bound(x).surrogate, parameters))  # type: ignore[misc]
    if pyro is not None:
        pyro.enable_validation(False)
        dist, infer = pyro.distributions, pyro.infer

        def their_model() -> None:
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 2 * b, 1.0), obs=x)

        def their_guide(enumerate_: str | None = None) -> Callable[[], None]:
            def guide() -> None:
                pyro.module("parameters", holder)
                b = pyro.sample(
                    "b", dist.Bernoulli(logits=logit), infer={"enumerate": enumerate_} if enumerate_ else {}
                )
                pyro.sample("z", dist.Normal(loc - b, 0.8))

            return guide

        for name, loss, guide in (
            ("Pyro, ELBO, TraceGraph (score function)", infer.TraceGraph_ELBO(), their_guide()),
            ("Pyro, ELBO, TraceEnum", infer.TraceEnum_ELBO(max_plate_nesting=0), their_guide("parallel")),
            ("Pyro, IWELBO of 5, RenyiELBO(0)", infer.RenyiELBO(alpha=0.0, num_particles=5), their_guide()),
        ):

            def estimate(loss: Any = loss, guide: Any = guide) -> list[Tensor]:
                for p in parameters:
                    p.grad = None
                loss.loss_and_grads(their_model, guide)
                return [-p.grad for p in parameters]  # type: ignore[operator]

            estimators[name] = estimate
    rows: list[harness.Row] = []
    for name, estimate in estimators.items():
        draws = torch.stack([torch.stack(estimate()) for _ in range(500)])
        mean, error = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
        means = [f"{float(m):.3f} ± {float(e):.3f}" for m, e in zip(mean, error, strict=True)]
        rows.append({"name": name, "variance": round(float(draws.var(0).sum()), 4), "mean gradient": ", ".join(means)})
    harness.save("programmable_vi", "variance of a gradient", rows, PACKAGES)


SECTIONS = {"vae": vae, "objectives": objectives, "sites": sites, "numpyro": numpyro, "variance": variance}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()
