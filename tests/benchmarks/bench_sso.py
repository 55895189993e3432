"""SSO: loss against oracle calls and against time, beside optimizers in parameter space.

    python -m tests.benchmarks.bench_sso

An oracle call is one gradient of the loss on one batch (for line searches in parameter space, also every loss). Step
sizes of the peers are the best of a grid, by the last loss; ours is 1/L everywhere. Seconds are CPU seconds of one
thread. Needs dadaptation and prodigyopt.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_methods.optim import SSO, ArmijoSGD
from lit_methods.optim.sso import ConjugateGradient, GaussNewton
from lit_methods.optim.sso.solvers import inner_solver
from tests.benchmarks import harness

Problem = tuple[
    nn.Module, Callable[[int], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor], Callable[[], float]
]
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def logistic(seed: int, batch_size: int = 625, n: int = 2000, d: int = 100, plain: bool = False) -> Problem:
    """Logistic regression from zero, scales 1 to 0.01: network, batch of step t, loss, full loss.

    The labels are the sign of a random linear function of the unscaled factors, so that all directions matter alike;
    with ``plain`` of the features themselves, so that the short directions hardly matter.
    """
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    factors = torch.randn(n, d, generator=generator)
    x = factors * torch.logspace(0, -2, d) @ rotation
    y = ((x if plain else factors) @ torch.randn(d, 1, generator=generator) > 0).float()
    network = nn.Linear(d, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)

    def batch(t: int) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + t))[:batch_size]
        return x[rows], y[rows]

    loss = functional.binary_cross_entropy_with_logits
    return network, batch, loss, lambda: float(loss(network(x), y).detach())


def matrix_factorization(seed: int, hidden: int = 10) -> Problem:
    """Y = A X with condition number 1e10 by two linear layers, full batches; squared error summed over outputs."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.linspace(1, 1e-10, 10)[:, None] * torch.rand(10, 6, generator=generator)
    x = torch.randn(6, 1000, generator=generator)
    y = (a @ x).T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(6, hidden, bias=False), nn.Linear(hidden, 10, bias=False))

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return (z - target).square().sum(1).mean()

    return network, lambda t: (x.T, y), loss, lambda: float(loss(network(x.T), y).detach())


def train(problem: Problem, make: Make, calls: int, seconds_limit: float = float("inf")) -> dict[str, Any]:
    """Train until ``calls`` oracle calls are used or the time is over; the full loss at the end."""
    network, batch, loss_fn, full_loss = problem
    optimizer = make(network.parameters())
    used, seconds, t = 0, 0.0, 0
    while used < calls and seconds < seconds_limit:
        x, y = batch(t)
        t += 1

        def loss_of(z: Tensor, y: Tensor = y) -> Tensor:
            nonlocal used
            used += 1
            return loss_fn(z, y)

        def closure(x: Tensor = x) -> Any:
            if isinstance(optimizer, SSO):
                return network(x), loss_of
            optimizer.zero_grad()
            loss = loss_of(network(x))
            loss.backward()
            return loss

        start = time.process_time()
        if isinstance(optimizer, ArmijoSGD):
            optimizer.step(closure, lambda x=x: loss_of(network(x)))  # type: ignore[misc]
        else:
            optimizer.step(closure)
        seconds += time.process_time() - start
    return {"calls": used, "seconds": seconds, "loss": full_loss()}


def best_of_grid(problem: Callable[[], Problem], makes: dict[str, Make], calls: int) -> tuple[str, dict[str, Any]]:
    """The run with the least last loss among settings."""
    runs = {name: train(problem(), make, calls) for name, make in makes.items()}
    name = min(runs, key=lambda name: runs[name]["loss"] if math.isfinite(runs[name]["loss"]) else math.inf)
    return name, runs[name]


GRIDS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...]]] = {
    "SGD": (torch.optim.SGD, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
    "Adam": (torch.optim.Adam, (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    "Adagrad": (torch.optim.Adagrad, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    "LBFGS (one step per batch)": (lambda p, lr: torch.optim.LBFGS(p, lr, max_iter=1), (0.1, 0.3, 1.0)),
}


def contenders() -> dict[str, dict[str, Make]]:
    """Name -> settings to choose from -> optimizer."""
    ways: dict[str, dict[str, Make]] = {
        name: {f"lr {v:g}": lambda p, make=make, v=v: make(p, lr=v) for v in values}
        for name, (make, values) in GRIDS.items()
    }
    ways["ArmijoSGD"] = {"lr <= 1000": lambda p: ArmijoSGD(p, lr=1e3, grow=1.5)}
    if package := harness.peer("dadaptation"):
        ways["D-Adaptation Adam"] = {"default": lambda p: package.DAdaptAdam(p)}
    if prodigy := harness.peer("prodigyopt"):
        ways["Prodigy"] = {"default": lambda p: prodigy.Prodigy(p)}
    return ways


def ours(loss: str) -> dict[str, dict[str, Make]]:
    """SSO with 1/L and different numbers of inner steps."""
    ways: dict[str, dict[str, Make]] = {}
    for m in (1, 5, 20, 100):
        ways[f"SSO, m={m}"] = {"1/L": lambda p, m=m: SSO(p, lr=None, loss=loss, inner=GaussNewton(steps=m))}  # type: ignore[arg-type]
    ways["SSO, cg, m=20"] = {"1/L": lambda p: SSO(p, lr=None, loss=loss, inner=ConjugateGradient(steps=20))}  # type: ignore[arg-type]
    ways["SSO, armijo rule, m=20"] = {"c 0.5": lambda p: SSO(p, lr=4.0, inner=GaussNewton(steps=20), rule="armijo")}
    return ways


def compare(title: str, make_problem: Callable[[int], Problem], loss: str, calls: int) -> None:
    """Loss after ``calls`` oracle calls, time, and loss after the time that SSO with m=20 took."""
    rows: list[harness.Row] = []
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, settings in {**contenders(), **ours(loss)}.items():
        chosen, _ = best_of_grid(lambda: make_problem(0), settings, calls)
        runs[name] = [train(make_problem(seed), settings[chosen], calls) for seed in range(3)]
        losses = sorted(run["loss"] for run in runs[name])
        rows.append(
            {
                "optimizer": name,
                "setting": chosen,
                f"loss after {calls} calls, median of 3 seeds": f"{losses[1]:.3g}",
                "range": [f"{losses[0]:.3g}", f"{losses[2]:.3g}"],
                "CPU seconds": round(sorted(run["seconds"] for run in runs[name])[1], 2),
            }
        )
    budget = sorted(run["seconds"] for run in runs["SSO, m=20"])[1]
    for row in rows:
        make = {**contenders(), **ours(loss)}[row["optimizer"]][row["setting"]]
        timed = sorted(train(make_problem(seed), make, 10**9, budget)["loss"] for seed in range(3))
        row[f"loss after {budget:.2f} CPU s"] = f"{timed[1]:.3g}"
    harness.save("sso", title, rows, ("dadaptation", "prodigyopt"))


def step_cost() -> None:
    """One step beside SGD's on the same network: the price of an oracle call saved."""
    x, y = torch.randn(128, 784), torch.randint(10, (128,))

    def stepper(make: Make) -> Callable[[], object]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
        optimizer = make(network.parameters())

        def closure() -> Any:
            if isinstance(optimizer, SSO):
                return network(x), lambda z: functional.cross_entropy(z, y)
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(x), y)
            loss.backward()
            return loss

        return lambda: optimizer.step(closure)

    ways: dict[str, Make] = {"SGD": lambda p: torch.optim.SGD(p, lr=1e-3)}
    for inner in ("gauss_newton", "cg", "armijo", "adam"):
        for m in (1, 10):
            ways[f"SSO, {inner}, m={m}"] = lambda p, i=inner, m=m: SSO(
                p, lr=1e-2, inner=dataclasses.replace(inner_solver(i), steps=m, tol=0.0)
            )
    seconds = harness.alternate({name: stepper(make) for name, make in ways.items()}, rounds=9)
    harness.save("sso", "one step, MLP 784-512-256-10, batch 128", harness.ratios(seconds, "SGD"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare("logistic regression, condition 1e4, batch 625", logistic, "bce", 200)
    compare("matrix factorization, condition 1e10, full batch", matrix_factorization, "mse", 50)
    step_cost()
