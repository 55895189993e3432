"""Fractional SDEs beside torchsde: paths per second, memory, the bound beside the exact evidence, Hurst estimators.

    python -m tests.benchmarks.bench_fractional_sde [paths] [memory] [evidence] [hurst]

torchsde is driven as its users would at its best: ``BrownianInterval(..., dt=...)``, Euler, and ``logqp=True`` for the
divergence. diffrax is compiled before it is timed, and wants ``XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`` for one
thread. Networks, batch and steps are equal.
"""

import math
import sys
import time
from collections.abc import Callable
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_methods.vi import ControlMLP, DriftMLP, FractionalSDE, LinearDrift, MarkovFBM, fit_hurst, sample_fbm
from tests.benchmarks import harness

BATCH, DIM, STEPS, WIDTH = 64, 4, 100, 64


def ours(kind: str, backward: bool, batch: int = BATCH, **more: Any) -> Callable[[], None]:
    """A pass over the posterior of an SDE with a drift and a control of two hidden layers."""
    torch.manual_seed(0)
    noise = MarkovFBM(5, 20.0, 1.0, kind, None if kind == "white" else 0.7)  # type: ignore[arg-type]
    drift = DriftMLP(DIM, [WIDTH, WIDTH], periodic_time=True)
    control = ControlMLP(DIM, noise.num_ou, [WIDTH, WIDTH])
    sde = FractionalSDE(drift, 0.5, control, noise, DIM, dt=1 / STEPS, **more)
    x0, times = torch.zeros(batch, DIM), torch.tensor([0.0, 1.0])

    def work() -> None:
        with torch.set_grad_enabled(backward):
            path = sde(x0, times)
            if backward:
                (path.path_kl.mean() + path.x[:, -1].square().mean()).backward()

    return work


def peer(backward: bool, adjoint: bool, batch: int = BATCH) -> Callable[[], None] | None:
    """The same latent SDE by torchsde: drift of the posterior f, of the prior h, divergence by ``logqp``."""
    torchsde = harness.peer("torchsde")
    if torchsde is None:
        return None
    torch.manual_seed(0)

    class SDE(nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def __init__(self) -> None:
            super().__init__()
            self.prior = DriftMLP(DIM, [WIDTH, WIDTH], periodic_time=True)
            self.posterior = ControlMLP(DIM, 1, [WIDTH, WIDTH])

        def h(self, t: Tensor, x: Tensor) -> Tensor:
            return self.prior(x, t)

        def g(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.full_like(x, 0.5)

        def f(self, t: Tensor, x: Tensor) -> Tensor:
            # Ours has the noise's memory as an input, in white mode one number per dimension: equal networks.
            return self.posterior(x, x[..., None], t, None)

    sde, times = SDE(), torch.tensor([0.0, 1.0])
    solve = torchsde.sdeint_adjoint if adjoint else torchsde.sdeint

    def work() -> None:
        x0 = torch.zeros(batch, DIM)
        with torch.set_grad_enabled(backward):
            bm = torchsde.BrownianInterval(0.0, 1.0, size=(batch, DIM + 1), dt=1 / STEPS)  # logqp adds a channel
            x, logqp = solve(sde, x0, times, dt=1 / STEPS, method="euler", bm=bm, logqp=True)
            if backward:
                (logqp.sum(0).mean() + x[-1].square().mean()).backward()

    return work


def by_diffrax(backward: bool) -> Callable[[], None] | None:
    """The same by diffrax, compiled before it is timed; noise by its Brownian tree."""
    diffrax = harness.peer("diffrax")
    if diffrax is None:
        return None
    import equinox
    import jax
    import jax.numpy as jnp
    import lineax

    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    nets = tuple(
        equinox.nn.MLP(inputs, DIM, WIDTH, 2, activation=jnp.tanh, key=key)
        for inputs, key in zip((DIM + 2, 2 * DIM + 2), keys[:2], strict=True)
    )

    def loss(nets: Any, key: Any) -> Any:
        drift, control = nets

        def f(t: Any, z: Any, args: Any) -> Any:
            x, clock = z[:DIM], jnp.stack([jnp.sin(t), jnp.cos(t)])
            u = control(jnp.concatenate([x, x, clock]))
            return jnp.concatenate([drift(jnp.concatenate([x, clock])) + 0.5 * u, 0.5 * jnp.sum(u**2)[None]])

        def solve(key: Any) -> Any:
            noise = diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.5 / STEPS, shape=(DIM + 1,), key=key)
            s = jnp.full(DIM + 1, 0.5).at[-1].set(0.0)
            terms = diffrax.MultiTerm(
                diffrax.ODETerm(f), diffrax.ControlTerm(lambda t, z, args: lineax.DiagonalLinearOperator(s), noise)
            )
            return diffrax.diffeqsolve(
                terms, diffrax.Euler(), 0.0, 1.0, 1 / STEPS, jnp.zeros(DIM + 1), max_steps=STEPS + 1
            ).ys[0]

        z = jax.vmap(solve)(jax.random.split(key, BATCH))
        return jnp.mean(z[:, -1]) + jnp.mean(z[:, :DIM] ** 2)

    compiled = equinox.filter_jit(equinox.filter_value_and_grad(loss) if backward else loss)
    return lambda: jax.block_until_ready(equinox.filter(compiled(nets, keys[2]), equinox.is_array))


def paths(rounds: int = 9) -> None:
    for backward in (False, True):
        contenders: dict[str, Callable[[], object] | None] = {
            "ours, white": ours("white", backward),
            "ours, kind II, K = 5": ours("II", backward),
            "ours, kind I, K = 5": ours("I", backward),
            "ours, kind II, exact steps": ours("II", backward, exact_ou=True),
            "torchsde, Euler, BrownianInterval(dt)": peer(backward, adjoint=False),
            "diffrax, Euler, compiled": by_diffrax(backward),
        }
        if backward:
            contenders["torchsde, the same, adjoint"] = peer(backward, adjoint=True)
        there = {name: work for name, work in contenders.items() if work is not None}
        seconds = harness.alternate(there, rounds=rounds, warmup=1, clock=time.process_time)
        rows = harness.ratios(seconds, "ours, white")
        for row in rows:
            row["paths / s"] = round(BATCH * 1e3 / row["median_ms"])
        title = "forward and backward" if backward else "forward"
        size = f"batch {BATCH}, {DIM} dimensions, {STEPS} steps, two networks of width {WIDTH}, CPU time"
        harness.save("fractional_sde", f"{title}: {size}", rows, ("torchsde", "diffrax", "jax"))


def memory() -> None:
    """Bytes that autograd keeps for the backward pass."""
    rows = []
    for name, work in {
        "ours, white": ours("white", True),
        "ours, kind II, K = 5": ours("II", True),
        "torchsde, Euler": peer(True, adjoint=False),
    }.items():
        if work is None:
            continue
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            work()
        rows.append({"name": name, "saved_MB": round(sum(storages.values()) / 1e6, 2)})
    harness.save("fractional_sde", f"memory for the backward pass: batch {BATCH}, {STEPS} steps", rows, ("torchsde",))


class _Best(nn.Module):
    """The exact posterior's control of a bridge to ``o``."""

    def __init__(self, noise: MarkovFBM, o: float, std: float) -> None:
        super().__init__()
        self.w, self.g, self.o, self.std = noise.weights().detach(), noise.speeds, o, std

    def forward(self, x: Tensor, y: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        decay = torch.exp(-self.g * (2.0 - t.double()))
        sums = self.g[:, None] + self.g
        variance = (self.w[:, None] * self.w * -torch.expm1(-sums * (2.0 - t.double())) / sums).sum()
        left = x + (y * (self.w * (decay - 1))).sum(-1)
        return (self.o - left) / (variance + self.std**2) * (self.w * decay).sum()


def evidence() -> None:
    """How far the time step keeps the bound below the evidence, with the exact control; 5000 paths."""
    rows = []
    for hurst in (0.3, 0.5, 0.7):
        noise = MarkovFBM(5, 20.0, 6.0, "II", hurst)
        exact = noise.log_prob(torch.tensor([2.0]), torch.tensor([0.7]), 0.1).item()
        for steps in (50, 100, 200, 800):
            found: dict[str, Any] = {"hurst": hurst, "steps": steps, "log evidence": round(exact, 4)}
            for exact_ou in (False, True) if steps >= 100 else (True,):  # Euler is not stable in 50
                sde = FractionalSDE(
                    LinearDrift(), 1.0, _Best(noise, 0.7, 0.1), noise, 1, dt=2.0 / steps, exact_ou=exact_ou
                )
                path = sde(
                    torch.zeros(5_000, 1).double(),
                    torch.tensor([0.0, 2.0]),
                    generator=torch.Generator().manual_seed(0),
                )
                density = torch.distributions.Normal(path.x[:, -1, 0], 0.1).log_prob(torch.tensor(0.7))
                bound = density - path.path_kl
                name = "exact steps" if exact_ou else "Euler"
                found[f"ELBO, {name}"] = round(bound.mean().item(), 4)
                found[f"s.e., {name}"] = round((bound.std() / math.sqrt(len(bound))).item(), 4)
            rows.append(found)
    harness.save("fractional_sde", "the bound with the exact control, kind II, sd of the observation 0.1", rows, ())


def hurst(replicates: int = 50) -> None:
    """Root mean squared error and coverage of 95 % intervals of the three estimators, on exact paths."""
    rows = []
    for h in (0.2, 0.5, 0.8):
        for n in (100, 500):
            paths = sample_fbm(torch.arange(n), h, replicates, generator=torch.Generator().manual_seed(n)).numpy()
            for method in ("exact", "dfa", "rs"):
                start = time.process_time()
                fits = [fit_hurst(path, method=method) for path in paths]  # type: ignore[arg-type]
                each = 1e3 * (time.process_time() - start) / replicates
                estimates = np.array([fit.hurst for fit in fits])
                rows.append(
                    {
                        "hurst": h,
                        "points": n,
                        "method": method,
                        "bias": round(float(estimates.mean() - h), 4),
                        "rmse": round(float(np.sqrt(((estimates - h) ** 2).mean())), 4),
                        "promised s.e.": round(mean(fit.std_error for fit in fits), 4),
                        "coverage": round(mean(fit.low < h < fit.high for fit in fits), 3),
                        "ms": round(each, 1),
                    }
                )
    harness.save("fractional_sde", f"fit_hurst on {replicates} exact paths of kind I", rows, ())


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    for section in sys.argv[1:] or ["paths", "memory", "evidence", "hurst"]:
        {"paths": paths, "memory": memory, "evidence": evidence, "hurst": hurst}[section]()
