"""Optimistic mirror descent: step time against torch's SGD and Adam, and regret against learners without optimism.

Run as ``python -m tests.benchmarks.bench_optimistic_omd [section ...]``; sections are the functions below.
"""

import math
import sys
from collections.abc import Callable
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn

from lit_methods.datamodules import SEADataModule
from lit_methods.games import RingGAN
from lit_methods.online import run_online
from lit_methods.optim import (
    Ball,
    ExtraAdam,
    ExtraGradient,
    OptimisticAdam,
    OptimisticEnsemble,
    OptimisticFTRL,
    OptimisticOMD,
    OptimisticOnlineNewton,
)
from tests.benchmarks import harness

Learner = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SEEDS = (0, 1, 2)


def spread(values: list[float]) -> str:
    return f"{mean(values):.4g} ± {stdev(values):.2g}" if len(values) > 1 else f"{values[0]:.4g}"


class OGD(torch.optim.Optimizer):
    """Projected online gradient descent with step D / (G sqrt(t)), or with a constant step."""

    def __init__(self, params: list[nn.Parameter], diameter: float, bound: float, horizon: int | None = None) -> None:
        super().__init__(params, {"t": 0})
        self.scale, self.horizon = diameter / bound, horizon

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        group["t"] += 1
        (p,) = group["params"]
        p.sub_(p.grad, alpha=self.scale / math.sqrt(self.horizon or group["t"]))
        p.copy_(Ball(1.0)([p])[0])


def omd(bound: float, optimism: str = "last_gradient") -> Learner:
    return lambda ps: OptimisticOMD(ps, 2.0, grad_bound=bound, constraint=Ball(1.0), optimism=optimism)  # type: ignore[arg-type]


def projected(make: Learner) -> Learner:
    """An optimizer of torch, followed by the projection onto the ball."""

    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = make(params)
        optimizer.register_step_post_hook(lambda *_: [p.data.copy_(Ball(1.0)([p.data])[0]) for p in params])
        return optimizer

    return build


def step_time() -> None:
    """One step over the parameters of a ResNet-20-like model, and of one of 4.4M."""
    for name, shapes in (
        ("0.27M in 60 tensors", [(64, 64, 1, 1), (16,), (32, 16, 3, 3)] * 20 + [(181, 451)]),
        ("4.4M in 40 tensors", [(328, 328), (328,)] * 20 + [(1500, 1500)]),
    ):

        def contender(make: Learner, shapes: list[tuple[int, ...]] = shapes) -> Callable[[], object]:
            params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
            for p in params:
                p.grad = torch.randn_like(p)
            return make(params).step

        contenders = {
            "SGD": contender(lambda ps: torch.optim.SGD(ps, 1e-3, foreach=True)),
            "SGD, momentum": contender(lambda ps: torch.optim.SGD(ps, 1e-3, momentum=0.9, foreach=True)),
            "Adam": contender(lambda ps: torch.optim.Adam(ps, 1e-3, foreach=True)),
            "OptimisticOMD, constant, no optimism": contender(
                lambda ps: OptimisticOMD(ps, 1e-3, step_size="constant", optimism="none")
            ),
            "OptimisticOMD, constant": contender(lambda ps: OptimisticOMD(ps, 1e-3, step_size="constant")),
            "OptimisticOMD, adaptive, G given": contender(lambda ps: OptimisticOMD(ps, 1e-3, grad_bound=1e4)),
            "OptimisticOMD, adaptive": contender(lambda ps: OptimisticOMD(ps, 1e-3)),
            "OptimisticAdam": contender(lambda ps: OptimisticAdam(ps, 1e-3)),
        }
        rows = harness.ratios(harness.alternate(contenders, rounds=21, inner=5), "SGD, momentum")
        plain = next(row for row in rows if row["name"] == "SGD")["median_ms"]
        for row in rows:
            row["ratio to SGD"] = round(row["median_ms"] / plain, 2)
        harness.save("optimistic_omd", f"step time, {name}, float32", rows)


def noise_scaling(seeds: tuple[int, ...] = SEEDS) -> list[dict[str, object]]:
    """Card experiment 1: linear losses around a fixed direction; regret and its bound."""
    rows: list[dict[str, object]] = []
    for noise in (0.0, 0.1, 0.3, 1.0):
        regrets, rivals = [], []
        for seed in seeds:
            data = SEADataModule("iid", "linear", noise=noise, seed=seed, dtype="float64")
            rounds = data.stream()
            regrets.append(run_online(omd(1 + noise), rounds, "linear").regret("linear", rounds, 1.0))
            rivals.append(run_online(omd(1 + noise, "none"), rounds, "linear").regret("linear", rounds, 1.0))
        bound = 5 * math.sqrt(5) / 2 * 2 * (1 + noise) + math.sqrt(data.sigma2) * 10 * math.sqrt(2) + 10
        rows.append(
            {
                "noise": noise,
                "regret": spread(regrets),
                "without optimism": spread(rivals),
                "sqrt(sigma2)": round(math.sqrt(data.sigma2), 2),
                "bound (recalled)": round(bound, 1),
                "mean": mean(regrets),
            }
        )
    return rows


def drift(seeds: tuple[int, ...] = SEEDS) -> list[dict[str, object]]:
    """Card experiment 2: a direction that turns once in 200 rounds; regret (negative: it tracks)."""
    rows: list[dict[str, object]] = []
    for noise in (0.0, 1.0):
        bound = 1 + noise
        learners: dict[str, Learner] = {
            "OptimisticOMD": omd(bound),
            "OptimisticFTRL": lambda ps, g=bound: OptimisticFTRL(ps, 2.0, 2 * 2 * g, constraint=Ball(1.0)),  # type: ignore[misc]
            "OMD, the same step": omd(bound, "none"),
            "OGD, D / (G sqrt t)": lambda ps, g=bound: OGD(ps, 2.0, g),  # type: ignore[misc]
            "Adagrad (torch), projected": projected(lambda ps: torch.optim.Adagrad(ps, 0.5)),
            "Adam (torch), projected": projected(lambda ps: torch.optim.Adam(ps, 0.1)),
            "SGD (torch), lr 0.1, projected": projected(lambda ps: torch.optim.SGD(ps, 0.1)),
        }
        for name, learner in learners.items():
            regrets = []
            for seed in seeds:
                rounds = SEADataModule("drift", "linear", noise=noise, seed=seed, dtype="float64").stream()
                regrets.append(run_online(learner, rounds, "linear").regret("linear", rounds, 1.0))
            rows.append({"noise": noise, "learner": name, "regret": spread(regrets), "mean": mean(regrets)})
    return rows


def growth(seeds: tuple[int, ...] = SEEDS) -> list[dict[str, object]]:
    """Exponents of regret in T, fitted over the second half of powers of two, beside those of the bounds."""
    horizons = [125 * 2**k for k in range(6)]
    strongly: Learner = lambda ps: OptimisticOMD(  # noqa: E731
        ps, step_size="strongly_convex", strong_convexity=1.0, constraint=Ball(1.0)
    )
    newton: Learner = lambda ps: OptimisticOnlineNewton(ps, beta=10.0, epsilon=8.0, radius=1.0)  # noqa: E731
    cases: list[tuple[str, str, str, float, Learner, str]] = [
        ("no noise", "iid", "linear", 0.0, omd(1.0), "0"),
        ("i.i.d. noise 0.3", "iid", "linear", 0.3, omd(1.3), "0.5"),
        ("corrupted, 10 % of rounds", "corrupted", "linear", 0.1, omd(1.1), "0.5"),
        ("adversarial signs", "adversarial", "linear", 0.0, omd(1.0), "0.5"),
        ("random order, noise 0.3", "random_order", "quadratic", 0.3, omd(2.0), "0.5"),
        ("strongly convex, noise 0.5", "iid", "quadratic", 0.5, strongly, "0 (log T)"),
        ("exp-concave, noise 0.5", "iid", "least_squares", 0.5, newton, "0 (log T)"),
    ]
    rows: list[dict[str, object]] = []
    for name, kind, loss, noise, learner, bound in cases:
        curves = []
        for seed in seeds:
            data = SEADataModule(kind, loss, dim=8, rounds=horizons[-1], noise=noise, seed=seed, dtype="float64")  # type: ignore[arg-type]
            rounds = data.stream()
            trace = run_online(learner, rounds, loss)  # type: ignore[arg-type]
            curves.append([trace.regret(loss, rounds, 1.0, upto=t) for t in horizons])  # type: ignore[arg-type]
        average = np.mean(curves, 0)
        slope = float(np.polyfit(np.log(horizons), np.log(np.maximum(average, 1e-12)), 1)[0])
        rows.append(
            {
                "regime": name,
                "exponent": round(slope, 2),
                "exponent of the bound": bound,
                f"regret at T={horizons[0]}": f"{average[0]:.3g}",
                f"at T={horizons[-1]}": spread([c[-1] for c in curves]),
            }
        )
    return rows


def strongly_convex(seeds: tuple[int, ...] = SEEDS) -> list[dict[str, object]]:
    """Card experiment 3: quadratics with noise 0.5 and 0, step 2 / t; regret against T."""
    rows: list[dict[str, object]] = []
    learners: dict[str, Learner] = {
        "OptimisticOMD, 2 / t": lambda ps: OptimisticOMD(
            ps, step_size="strongly_convex", strong_convexity=1.0, constraint=Ball(1.0)
        ),
        "OGD, 1 / t": lambda ps: OptimisticOMD(
            ps, 0.5, step_size="strongly_convex", strong_convexity=1.0, constraint=Ball(1.0), optimism="none"
        ),
    }
    for noise in (0.5, 0.0):
        for name, learner in learners.items():
            curves = []
            for seed in seeds:
                rounds = SEADataModule(
                    "iid", "quadratic", rounds=20000, noise=noise, seed=seed, dtype="float64"
                ).stream()
                trace = run_online(learner, rounds, "quadratic")
                curves.append([trace.regret("quadratic", rounds, 1.0, upto=t) for t in (500, 5000, 20000)])
            columns = [spread(list(column)) for column in zip(*curves, strict=True)]
            rows.append(
                {"noise": noise, "learner": name, **dict(zip(("T=500", "5000", "20000"), columns, strict=True))}
            )
            rows[-1]["mean"] = mean(c[-1] for c in curves)
    return rows


def dynamic(seeds: tuple[int, ...] = (0,), horizon: int = 20000) -> list[dict[str, object]]:
    """Card experiment 4: least squares with ten abrupt changes; dynamic regret."""
    rows: list[dict[str, object]] = []
    learners: dict[str, Learner] = {
        "OGD, D / (G sqrt T)": lambda ps: OGD(ps, 2.0, 2.0, horizon),
        "OptimisticOMD, adaptive": omd(2.0),
        "OptimisticEnsemble": lambda ps: OptimisticEnsemble(
            ps, diameter=2.0, grad_bound=2.0, smoothness=1.0, horizon=horizon, constraint=Ball(1.0)
        ),
        **{
            f"OptimisticOMD, step {eta:.3g}": lambda ps, eta=eta: OptimisticOMD(  # type: ignore[misc]
                ps, eta, step_size="constant", constraint=Ball(1.0)
            )
            for eta in OptimisticEnsemble.step_pool(2.0, 2.0, 1.0, horizon)
        },
    }
    for noise in (0.05, 0.3):
        for name, learner in learners.items():
            values = []
            for seed in seeds:
                data = SEADataModule(
                    "abrupt", "least_squares", dim=10, rounds=horizon, noise=noise, seed=seed, dtype="float64"
                )
                rounds = data.stream()
                values.append(run_online(learner, rounds, "least_squares").dynamic_regret("least_squares", rounds))
            rows.append({"noise": noise, "learner": name, "dynamic regret": spread(values), "mean": mean(values)})
    return rows


def bilinear(make: Learner, rounds: int = 1000) -> float:
    """min_x max_y x y from (1, 1): the distance to the equilibrium at the end."""
    x, y = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))
    optimizer = make([{"params": [x]}, {"params": [y], "maximize": True}])  # type: ignore[list-item]

    def closure() -> Tensor:
        optimizer.zero_grad()
        (x * y).backward()
        return (x * y).detach()

    for _ in range(rounds):
        optimizer.step(closure)  # type: ignore[call-overload]
    return float((x * x + y * y).detach().sqrt())


def rock_paper_scissors(optimism: str, rounds: int = 20000) -> float:
    """Duality gap of the last iterates of (optimistic) multiplicative weights."""
    payoff = torch.tensor([[0, -1, 2], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64)
    x, y = (nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in ([0.6, 0.3, 0.1], [0.2, 0.5, 0.3]))
    players = [{"params": [x]}, {"params": [y], "maximize": True}]
    optimizer = OptimisticOMD(players, 0.1, step_size="constant", mirror="entropy", optimism=optimism)  # type: ignore[arg-type]
    for _ in range(rounds):
        x.grad, y.grad = payoff @ y.detach(), payoff.T @ x.detach()
        optimizer.step()
    with torch.no_grad():
        return float((payoff.T @ x).max() - (payoff @ y).min())


def games() -> list[dict[str, object]]:
    """Card experiment 5."""
    return [
        {
            "game": "x y, 1000 rounds",
            "learner": "OptimisticOMD",
            "gap": bilinear(lambda g: OptimisticOMD(g, 0.1, step_size="constant")),
        },
        {"game": "x y, 1000 rounds", "learner": "ExtraGradient", "gap": bilinear(lambda g: ExtraGradient(g, 0.1))},
        {
            "game": "x y, 1000 rounds",
            "learner": "descent-ascent (SGD)",
            "gap": bilinear(lambda g: torch.optim.SGD(g, 0.1)),
        },
        {
            "game": "rock-paper-scissors, 20000",
            "learner": "OptimisticOMD, entropy",
            "gap": rock_paper_scissors("last_gradient"),
        },
        {"game": "rock-paper-scissors, 20000", "learner": "without optimism", "gap": rock_paper_scissors("none")},
    ]


def gan(seeds: tuple[int, ...] = SEEDS, steps: int = 3000) -> list[dict[str, object]]:
    """Eight Gaussians: Adam, OptimisticAdam and ExtraAdam at one lr; ExtraAdam sees two batches a step."""
    rows: list[dict[str, object]] = []
    learners: dict[str, Learner] = {
        "Adam": lambda ps: torch.optim.Adam(ps, 1e-3, betas=(0.5, 0.9)),
        "OptimisticAdam": lambda ps: OptimisticAdam(ps, 1e-3, betas=(0.5, 0.9)),
        "ExtraAdam": lambda ps: ExtraAdam(ps, 1e-3, betas=(0.5, 0.9)),
    }
    for name, learner in learners.items():
        ends: dict[str, list[float]] = {"val/modes": [], "val/quality": []}
        for seed in seeds:
            torch.manual_seed(seed)
            model = RingGAN()
            logged: dict[str, float] = {}
            model.log = lambda key, value, logged=logged, **_: logged.update({key: float(value)})  # type: ignore[method-assign,assignment,misc]
            optimizer = learner(list(model.parameters()))

            def closure(model: RingGAN = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = model.training_step(torch.zeros(1), 0)
                loss.backward()
                return loss.detach()

            for _ in range(steps // (2 if name == "ExtraAdam" else 1)):
                optimizer.step(closure)  # type: ignore[call-overload]
            with torch.no_grad():
                model.validation_step(torch.zeros(1), 0)
            for key in ends:
                ends[key].append(logged[key])
        rows.append({"learner": name, "modes of 8": ends["val/modes"], "quality": spread(ends["val/quality"])})
    return rows


SECTIONS = (noise_scaling, drift, growth, strongly_convex, dynamic, games, gan)

if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    if not wanted or "step_time" in wanted:
        step_time()
    for section in SECTIONS:
        if not wanted or section.__name__ in wanted:
            table = [{k: v for k, v in row.items() if k != "mean"} for row in section()]
            harness.save("optimistic_omd", section.__name__, table)
