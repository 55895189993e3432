"""Consensus-based optimization beside CBXpy, CMA-ES and evotorch: time of a step, success at equal evaluations.

    python -m tests.benchmarks.bench_cbo [step | floor | kin | rastrigin | ackley | digits]

One thread; times are CPU times of this process, contenders alternating.
"""

import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_methods.optim import (
    CBO,
    AdamCBO,
    ConsensusBasedSampling,
    ConsensusHopping,
    MemoryCBO,
    PolarizedCBO,
    particle_losses,
)
from lit_methods.optim.cbo import InitialCloud, ParticleBatches
from tests.benchmarks import harness

PACKAGES = ("cbx", "cma", "evotorch", "numpy")
DIM = 20
N = 200
STEPS = 2000
START, SPREAD = 2.0, 3.0
Run = Callable[[int], np.ndarray]
Loss = Callable[[Tensor], Tensor]


# --- time of a step ---------------------------------------------------------------------------------------------------


def cpu_alternate(contenders: dict[str, Callable[[], object]], rounds: int, inner: int) -> dict[str, list[float]]:
    """Like ``harness.alternate``, in CPU seconds: this machine is shared."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds + 1):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            start = time.process_time()
            for _ in range(inner):
                contenders[name]()
            if r:
                seconds[name].append((time.process_time() - start) / inner)
    return seconds


def ours(n: int, d: int, loss: Loss | None = None, **arguments: Any) -> Callable[[], object]:
    x = nn.Parameter(torch.zeros(d))
    optimizer = CBO([("x", x)], num_particles=n, batches=ParticleBatches(None), stall_tol=0.0, seed=0, **arguments)
    return lambda: optimizer.step(sum_of_squares if loss is None else lambda particles: loss(particles["x"]))


def cbx_step(
    n: int, d: int, runs: int = 1, backend: str = "numpy", noise: str = "anisotropic", loss: Loss | None = None
) -> Callable[[], object]:
    from cbx.dynamics import CBO as Peer
    from cbx.utils.torch_utils import to_torch_dynamic

    settings = {"f_dim": "3D", "alpha": 50.0, "dt": 0.1, "lamda": 1.0, "sigma": 0.4**0.5, "noise": noise}
    if backend == "torch":
        loss = loss or (lambda x: x.square().sum(-1))
        peer = to_torch_dynamic(Peer)(loss, x=torch.randn(runs, n, d), verbosity=0, **settings)
    else:
        x = np.random.default_rng(0).standard_normal((runs, n, d))
        peer = Peer(lambda x: np.square(x).sum(-1), x=x, verbosity=0, **settings)
    return peer.step


def step() -> None:
    for n, d, inner in ((100, 20, 100), (200, 20, 100), (200, 650, 20), (100, 10_000, 3)):
        draws = torch.empty(n, d)
        contenders: dict[str, Callable[[], object]] = {
            "ours": ours(n, d),
            "ours, isotropic": ours(n, d, noise="isotropic", sigma=0.05),
            "cbx (numpy, float64)": cbx_step(n, d),
            "cbx (numpy), isotropic": cbx_step(n, d, noise="isotropic"),
            "cbx (torch, float32)": cbx_step(n, d, backend="torch"),
            "floor: N d normal draws": draws.normal_,
        }
        if d < 1000:
            contenders["ours, 10 runs in one array, each"] = ours(n, d, num_runs=10)
            contenders["cbx (numpy), 10 runs in one array, each"] = cbx_step(n, d, 10)
            contenders["cbx (torch), 10 runs in one array, each"] = cbx_step(n, d, 10, backend="torch")
        seconds = cpu_alternate(contenders, rounds=15, inner=inner)
        for name in seconds:
            if name.endswith("each"):
                seconds[name] = [t / 10 for t in seconds[name]]
        rows = harness.ratios(seconds, "ours")
        for row in rows:
            row["steps per second"] = round(1e3 / row["median_ms"])
        harness.save("cbo", f"one step, N={n}, d={d}, sum of squares, CPU time", rows, PACKAGES)


def floor() -> None:
    """What of a step is not the loss or the draws, which any library needs."""
    for n, d, inner in ((1000, 1000, 5), (100, 20, 100)):
        points, draws = torch.randn(n, d), torch.empty(n, d)

        def loss(x: Tensor) -> Tensor:
            return rastrigin(x, torch)

        contenders: dict[str, Callable[[], object]] = {
            "ours": ours(n, d, loss),
            "cbx (torch, float32)": cbx_step(n, d, backend="torch", loss=loss),
            "floor: the loss": lambda points=points: loss(points),
            "floor: N d normal draws": draws.normal_,
        }
        rows = harness.ratios(cpu_alternate(contenders, rounds=15, inner=inner), "ours")
        harness.save("cbo", f"one step, N={n}, d={d}, Rastrigin, CPU time", rows, PACKAGES)


def kin() -> None:
    """A step of the variants, at the peer's settings."""
    from cbx import dynamics

    pairs: dict[str, tuple[type[CBO], str, dict[str, Any]]] = {
        "covariance noise": (ConsensusBasedSampling, "CBS", {}),
        "memory": (MemoryCBO, "CBOMemory", {"lambda_": 1.0, "sigma": 0.4**0.5}),
        "polarized": (PolarizedCBO, "PolarCBO", {"lambda_": 1.0, "sigma": 0.4**0.5}),
        "Adam": (AdamCBO, "AdamCBO", {"lambda_": 1.0, "sigma": 0.4**0.5}),
    }
    for n, d, inner in ((100, 20, 40), (100, 650, 2)):
        rows = []
        for name, (kind, peer, arguments) in pairs.items():
            x = nn.Parameter(torch.zeros(d))
            optimizer = kind([("x", x)], num_particles=n, seed=0, **arguments)
            settings = {"f_dim": "3D", "alpha": 50.0, "dt": 0.1, "verbosity": 0}
            if kind is not ConsensusBasedSampling:
                settings |= {"lamda": 1.0, "sigma": 0.4**0.5, "noise": "anisotropic"}
            start = np.random.default_rng(0).standard_normal((1, n, d))
            other = getattr(dynamics, peer)(lambda x: np.square(x).sum(-1), x=start, **settings)
            contenders: dict[str, Callable[[], object]] = {
                f"ours: {kind.__name__}": lambda optimizer=optimizer: optimizer.step(sum_of_squares),
                f"cbx: {peer}": other.step,
            }
            found = harness.ratios(cpu_alternate(contenders, rounds=9, inner=inner), f"ours: {kind.__name__}")
            rows += [{"variant": name} | row for row in found]
        harness.save("cbo", f"one step of the variants, N={n}, d={d}, sum of squares, CPU time", rows, PACKAGES)


def sum_of_squares(particles: dict[str, Tensor]) -> Tensor:
    return particles["x"].square().sum(-1)


# --- success at equal evaluations -------------------------------------------------------------------------------------


def rastrigin(x: Any, lib: Any) -> Any:
    return (x**2 + 2.5 * (1 - lib.cos(2 * np.pi * x))).sum(-1)


def ackley(x: Any, lib: Any) -> Any:
    hole = 20 - 20 * lib.exp(-0.2 * lib.sqrt((x**2).mean(-1)))
    return hole + np.e - lib.exp(lib.cos(2 * np.pi * x).mean(-1))


def with_ours(function: Callable[..., Any], build: Callable[..., Any]) -> Run:
    def run(seed: int) -> np.ndarray:
        x = nn.Parameter(torch.full((DIM,), START))
        optimizer = build([("x", x)], seed)
        for _ in range(STEPS):
            optimizer.step(lambda p: function(p["x"], torch))
        return x.detach().numpy()

    return run


def our_cbo(params: Any, seed: int) -> CBO:
    return CBO(
        params,
        lr=0.01,
        sigma=5.1,
        num_particles=N,
        alpha=1e5,
        batches=ParticleBatches(None),
        init=InitialCloud(SPREAD, True),
        stall_tol=0.0,
        seed=seed,
    )


def our_hopping(params: Any, seed: int) -> ConsensusHopping:
    return ConsensusHopping(params, num_particles=N, alpha=1e5, width_decay=0.98, width_decay_every=10, seed=seed)


def with_cbx(function: Callable[..., Any]) -> Run:
    from cbx.dynamics import CBO as Peer

    def run(seed: int) -> np.ndarray:
        x = START + SPREAD * np.random.default_rng(seed).standard_normal((1, N, DIM))
        settings = {"f_dim": "3D", "alpha": 1e5, "dt": 0.01, "lamda": 1.0, "sigma": 5.1, "noise": "anisotropic"}
        peer = Peer(lambda x: function(x, np), x=x, verbosity=0, seed=seed, check_f_dims=False, **settings)
        for _ in range(STEPS):
            peer.step()
        return peer.consensus[0, 0]

    return run


def with_cma(function: Callable[..., Any]) -> Run:
    import cma

    def run(seed: int) -> np.ndarray:
        options = {"maxfevals": N * STEPS, "verbose": -9, "seed": seed + 1}
        found, _ = cma.fmin2(
            None,
            np.full(DIM, START),
            SPREAD,
            options,
            restarts=9,
            bipop=True,
            parallel_objective=lambda points: list(function(np.asarray(points), np)),
        )
        return found

    return run


def with_evotorch(function: Callable[..., Any], build: Callable[[Any], Any]) -> Run:
    from evotorch import Problem

    def run(seed: int) -> np.ndarray:
        problem = Problem(
            "min",
            lambda x: function(x, torch),
            solution_length=DIM,
            initial_bounds=(START - 1e-6, START + 1e-6),
            vectorized=True,
            seed=seed,
        )
        searcher = build(problem)
        for _ in range(STEPS):
            searcher.step()
        return searcher.status["center"].numpy()

    return run


def success(name: str, function: Callable[..., Any], seeds: int) -> None:
    from evotorch.algorithms import CEM, PGPE, SNES

    contenders: dict[str, Run] = {
        "ours: CBO": with_ours(function, our_cbo),
        "ours: ConsensusHopping": with_ours(function, our_hopping),
        "cbx: CBO": with_cbx(function),
        "cma: BIPOP-CMA-ES": with_cma(function),
        "evotorch: SNES": with_evotorch(function, lambda p: SNES(p, popsize=N, stdev_init=SPREAD)),
        "evotorch: CEM": with_evotorch(function, lambda p: CEM(p, popsize=N, parenthood_ratio=0.25, stdev_init=SPREAD)),
        "evotorch: PGPE": with_evotorch(
            function,
            lambda p: PGPE(p, popsize=N, center_learning_rate=0.1, stdev_learning_rate=0.1, stdev_init=SPREAD),
        ),
    }
    distances: dict[str, list[float]] = {key: [] for key in contenders}
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    for seed in range(seeds):
        for key, run in contenders.items():
            start = time.process_time()
            distances[key].append(float(np.linalg.norm(run(seed))))
            seconds[key].append(time.process_time() - start)
    base = median(seconds["ours: CBO"])
    rows = [
        {
            "method": key,
            "success": f"{sum(x < 0.5 for x in distances[key])}/{seeds}",
            "median distance": f"{median(distances[key]):.2g}",
            "evaluations per CPU second": round(N * STEPS / median(seconds[key]), -3),
            "CPU time / ours": round(median(seconds[key]) / base, 2),
        }
        for key in contenders
    ]
    harness.save("cbo", f"{name}, d={DIM}, {N * STEPS} evaluations, start at {START:g}", rows, PACKAGES)


# --- a classifier of digits -------------------------------------------------------------------------------------------


def digits(seeds: int = 3, epochs: int = 50) -> None:
    """Test accuracy of a 650-parameter network at equal numbers of evaluated (network, batch) pairs."""
    from evotorch import Problem
    from evotorch.algorithms import PGPE, SNES
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.images).float().flatten(1)[order] / 16, torch.tensor(data.target)[order]
    x_train, y_train, x_test, y_test = x[:1437], y[:1437], x[1437:], y[1437:]

    def network() -> nn.Module:
        norm = nn.BatchNorm1d(10, eps=1e-4, affine=False, track_running_stats=False)
        return nn.Sequential(nn.Linear(64, 10), nn.ReLU(), norm)

    def batches(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(epochs):
            for rows in torch.randperm(1437, generator=generator).split(64)[:22]:
                yield epoch, (x_train[rows], y_train[rows])

    def accuracy(model: nn.Module) -> float:
        return float((model(x_test).argmax(1) == y_test).float().mean())

    def with_cbo(seed: int) -> float:
        model = network()
        optimizer = CBO(model, num_particles=N, batches=ParticleBatches(20), alpha=5.0, seed=seed)
        cooled = 0
        for epoch, batch in batches(seed):
            if epoch // 15 > cooled:
                cooled += 1
                optimizer.param_groups[0]["sigma"] *= np.log2(cooled + 1) / np.log2(cooled + 2)
                optimizer.param_groups[0]["alpha"] *= 2
            optimizer.step(particle_losses(model, nn.functional.cross_entropy, batch))
        return accuracy(model)

    def with_hopping(seed: int) -> float:
        torch.manual_seed(seed)
        model = network()
        optimizer = ConsensusHopping(model, num_particles=N, alpha=5.0, width=0.7, seed=seed)
        for _, batch in batches(seed):
            optimizer.step(particle_losses(model, nn.functional.cross_entropy, batch))
        return accuracy(model)

    def with_strategy(build: Callable[[Any], Any]) -> Callable[[int], float]:
        def run(seed: int) -> float:
            model = network()
            shapes = {name: p.shape for name, p in model.named_parameters()}
            current: dict[str, Any] = {}

            def losses(points: Tensor) -> Tensor:
                parts = points.split([shape.numel() for shape in shapes.values()], 1)
                particles = {n: part.view(-1, *s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
                return particle_losses(model, nn.functional.cross_entropy, current["batch"])(particles)

            problem = Problem(
                "min", losses, solution_length=650, initial_bounds=(-1e-6, 1e-6), vectorized=True, seed=seed
            )
            searcher = build(problem)
            for _, current["batch"] in batches(seed):
                searcher.step()
            nn.utils.vector_to_parameters(searcher.status["center"].clone(), model.parameters())
            return accuracy(model)

        return run

    def with_adam(seed: int) -> float:
        torch.manual_seed(seed)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _, (inputs, labels) in batches(seed):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        return accuracy(model)

    contenders = {
        "ours: CBO": with_cbo,
        "ours: ConsensusHopping": with_hopping,
        "evotorch: SNES": with_strategy(lambda p: SNES(p, popsize=N, stdev_init=0.5)),
        "evotorch: PGPE": with_strategy(
            lambda p: PGPE(p, popsize=N, center_learning_rate=0.1, stdev_learning_rate=0.1, stdev_init=0.3)
        ),
        "Adam (gradients; one network)": with_adam,
    }
    rows = []
    for name, run in contenders.items():
        start = time.process_time()
        values = [run(seed) for seed in range(seeds)]
        rows.append(
            {
                "method": name,
                "test accuracy": f"{np.mean(values):.3f}",
                "range": [round(min(values), 3), round(max(values), 3)],
                "CPU seconds a run": round((time.process_time() - start) / seeds, 1),
            }
        )
    harness.save("cbo", f"digits, 650 parameters, {epochs} epochs, N={N}, {seeds} seeds", rows, PACKAGES)


SECTIONS: dict[str, Callable[[], None]] = {
    "step": step,
    "floor": floor,
    "kin": kin,
    "rastrigin": lambda: success("Rastrigin", rastrigin, seeds=10),
    "ackley": lambda: success("Ackley", ackley, seeds=10),
    "digits": digits,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()
