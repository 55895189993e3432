"""Sinkhorn-Newton-Sparse beside POT, geomloss, regot and the exact solver: error against CPU time, one thread.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_sinkhorn_newton_sparse [SECTION ...]

Sections: table seeds images large batch backward points.

Problems: assignment with costs uniform in [0, 1], and scikit-learn digits enlarged to 28x28, at eta = 1200. The error
is measured alike for every solver, ``|P 1 - a|_1 + |P^T 1 - b|_1`` of the plan it returns. POT's solvers run in pieces
that warm-start each other, so that they can be stopped at the cap; the others run from the start with growing budgets.
"""

import math
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from lit_methods.transport import OTLoss, SinkhornNewton, grid_points, point_cost, sinkhorn_newton
from tests.benchmarks import harness

ETA = 1200.0
TARGET = 1e-9
PACKAGES = ("POT", "geomloss", "regot", "numpy", "scipy")
ot, geomloss, regot = (harness.peer(name) for name in ("ot", "geomloss", "regot"))


class Problem(NamedTuple):
    cost: np.ndarray
    a: np.ndarray
    b: np.ndarray
    eta: float


class Point(NamedTuple):
    """Where a solver was after ``seconds`` of CPU time."""

    seconds: float
    iterations: int
    error: float


def assignment(n: int, seed: int = 0, eta: float = ETA) -> Problem:
    return Problem(np.random.default_rng(seed).random((n, n)), np.full(n, 1 / n), np.full(n, 1 / n), eta)


def images(p: int, first: int = 0, second: int = 1) -> Problem:
    pair = torch.from_numpy(load_digits().images[[first, second]])[:, None] / 16
    pair = torch.nn.functional.interpolate(pair, size=(28, 28), mode="bilinear").flatten(1) + 0.01
    pair = pair / pair.sum(1, keepdim=True)
    grid = grid_points(28, 28).double()
    cost = point_cost(grid, grid) if p == 2 else torch.cdist(grid, grid, p=1)
    return Problem((cost / cost.max()).numpy(), pair[0].numpy(), pair[1].numpy(), ETA)


def error_of(plan: Any, problem: Problem) -> float:
    plan = np.asarray(plan)
    return float(np.abs(plan.sum(1) - problem.a).sum() + np.abs(plan.sum(0) - problem.b).sum())


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def ours(problem: Problem, **settings: Any) -> Iterator[Point]:
    tensors = [torch.from_numpy(x) for x in problem[:3]]
    for tol in (1e-1, 1e-2, 1e-4, 1e-6, 0.5 * TARGET):
        seconds, result = timed(lambda tol=tol: sinkhorn_newton(*tensors, eta=problem.eta, tol=tol, **settings))
        yield Point(seconds, int(result.n_sinkhorn + result.n_newton), error_of(result.plan, problem))


def pot(problem: Problem, method: str, piece: int) -> Iterator[Point]:
    spent, iterations = 0.0, 0
    settings: dict[str, Any] = {"numItermax": piece, "stopThr": 0, "warn": False, "log": True}
    solve = partial(ot.sinkhorn, problem.a, problem.b, problem.cost, 1 / problem.eta, method, **settings)
    while True:
        seconds, (plan, log) = timed(solve)
        spent, iterations = spent + seconds, iterations + piece
        warmstart = (log["log_u"], log["log_v"]) if "log_u" in log else (np.log(log["u"]), np.log(log["v"]))
        solve = partial(solve, warmstart=warmstart)
        yield Point(spent, iterations, error_of(plan, problem))


def pot_stabilized(problem: Problem) -> Iterator[Point]:
    solve = partial(ot.sinkhorn, problem.a, problem.b, problem.cost, 1 / problem.eta, "sinkhorn_stabilized", warn=False)
    iterations = 100
    while True:
        seconds, plan = timed(partial(solve, numItermax=iterations, stopThr=1e-11))
        yield Point(seconds, iterations, error_of(plan, problem))
        iterations *= 3


def of_regot(problem: Problem, name: str, budgets: tuple[int, ...]) -> Iterator[Point]:
    solver = getattr(regot, f"sinkhorn_{name}")
    cost = np.asfortranarray(problem.cost)
    for budget in budgets:
        seconds, result = timed(
            lambda n=budget: solver(cost, problem.a, problem.b, 1 / problem.eta, tol=1e-10, max_iter=n)
        )
        yield Point(seconds, int(result.niter), error_of(result.plan, problem))


def of_geomloss(problem: Problem) -> Iterator[Point]:
    from geomloss import ot as geomloss_ot

    tensors = {k: torch.from_numpy(x) for k, x in zip(("C", "a", "b"), problem[:3], strict=True)}
    iterations = 3
    while True:
        seconds, result = timed(partial(geomloss_ot.solve, **tensors, reg=1 / problem.eta, max_iter=iterations))
        yield Point(seconds, iterations, error_of(result.plan, problem))
        iterations *= 3


def contenders(problem: Problem, cap: float) -> dict[str, Callable[[], Iterator[Point]]]:
    n = len(problem.a)
    found: dict[str, Callable[[], Iterator[Point]]] = {
        "ours": lambda: ours(problem),
        "ours, eps_scaling=0": lambda: ours(problem, eps_scaling=0),
    }
    if regot:
        found["regot ssns"] = lambda: killed_at(cap, of_regot(problem, "ssns", (5, 10, 20, 40, 1000)))
        found["regot splr"] = lambda: killed_at(cap, of_regot(problem, "splr", (10, 30, 100, 2000)))
        if n <= 1000:
            found["regot newton"] = lambda: of_regot(problem, "newton", (5, 10, 20, 100))
    if ot:
        found["POT sinkhorn"] = lambda: pot(problem, "sinkhorn", 20 if n > 1000 else 1000)
        found["POT sinkhorn_log"] = lambda: pot(problem, "sinkhorn_log", 5 if n > 1000 else 200)
        if n <= 1000:
            found["POT sinkhorn_stabilized"] = lambda: pot_stabilized(problem)
    if geomloss:
        found["geomloss ot.solve"] = lambda: of_geomloss(problem)
    return found


def killed_at(cap: float, points: Iterator[Point]) -> Iterator[Point]:
    """The points, from a process that the system kills after ``cap`` CPU seconds: regot cannot be interrupted."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(cap), math.ceil(cap)))
        for point in points:
            sender.send(point)

    process = context.Process(target=work, daemon=True)
    process.start()
    sender.close()
    last = Point(cap, 0, math.inf)
    try:
        while True:
            last = receiver.recv()
            yield last
    except EOFError:
        process.join()
        if process.exitcode:
            yield last._replace(seconds=cap)
    finally:
        process.kill()


def run(points: Iterator[Point], cap: float) -> list[Point]:
    """Points until the error reaches the target or is NaN, or the next point would probably pass the cap."""
    taken: list[Point] = []
    for point in points:
        previous = taken[-1].seconds if taken else 0.0
        taken.append(point)
        if not point.error > TARGET or point.seconds + 3 * (point.seconds - previous) > 1.2 * cap:
            break
    return taken


def table(name: str, problem: Problem, cap: float, section: str, repeats: int = 3) -> dict[str, list[Point]]:
    """One row per solver: CPU seconds to the target, or the error at the cap."""
    curves = {}
    for solver, start in contenders(problem, cap).items():
        runs = [run(start(), cap)]
        if runs[0][-1].seconds < 3:
            runs += [run(start(), cap) for _ in range(repeats - 1)]
        curves[solver] = [*runs[0][:-1], runs[0][-1]._replace(seconds=median(r[-1].seconds for r in runs))]
        print(name, solver, curves[solver][-1], flush=True)
    base = curves["ours"][-1].seconds
    rows = []
    for solver, points in curves.items():
        end = points[-1]
        reached = end.error <= TARGET
        rows.append(
            {
                "problem": name,
                "solver": solver,
                "reached 1e-9": reached,
                "iterations": end.iterations,
                "CPU s": round(end.seconds, 3),
                "error": f"{end.error:.1e}",
                "ratio to ours": ("" if reached else ">= ") + f"{end.seconds / base:.1f}",
            }
        )
    if ot:
        seconds = [timed(lambda: ot.emd(problem.a, problem.b, problem.cost, 10**7))[0] for _ in range(repeats)]
        rows.append(
            {"problem": name, "solver": "POT emd: exact, no entropy", "reached 1e-9": True, "iterations": ""}
            | {"CPU s": round(median(seconds), 3), "error": "", "ratio to ours": f"{median(seconds) / base:.1f}"}
        )
    harness.save("sinkhorn_newton_sparse", section, rows, PACKAGES)
    return curves


def large(cap: float = 60.0) -> None:
    """n = 5000, every solver under the same cap, drawn; at the card's eta Sinkhorn needs few sweeps, so also at ten."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, eta in zip(figure.subplots(1, 2), (ETA, 10 * ETA), strict=True):
        section = f"n=5000, eta={eta:g}, {cap:g} s each"
        for solver, points in table("assignment, n=5000", assignment(5000, 0, eta), cap, section, repeats=1).items():
            axes.plot([p.seconds for p in points], [p.error for p in points], marker=".", label=solver)
        axes.set(yscale="log", xscale="log", xlim=(0.9, 100), ylim=(1e-13, 10))
        axes.set(xlabel="CPU seconds", ylabel="marginal error", title=f"eta = {eta:g}")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(harness.RESULTS / "sinkhorn_newton_sparse_5000.png", dpi=120)


def points() -> None:
    """Loss and gradient between point sets in three dimensions, with the matrix of costs and in tiles."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for n in (2000, 5000, 10_000):
        for eta in (20.0, 1000.0):
            for tiled in (False, True):
                if n * n * 8 * 5 > 2e9 and not tiled:
                    continue
                with context.Pool(1) as pool:
                    seconds, megabytes = pool.apply(_points, (n, eta, tiled))
                rows.append({"n": n, "eta": eta, "tiled": tiled, "CPU s": round(seconds, 2), "MB more": megabytes})
                print(rows[-1], flush=True)
    harness.save("sinkhorn_newton_sparse", "point sets, float64, forward and backward", rows)


def _points(n: int, eta: float, tiled: bool) -> tuple[float, int]:
    """CPU seconds, and by how many megabytes the largest memory grew."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, dtype=torch.float64, generator=generator).requires_grad_()
    y = torch.rand(n, 3, dtype=torch.float64, generator=generator).square()
    OTLoss(eta, tiled=tiled)(x[:300], y[:300]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, _ = timed(lambda: OTLoss(eta, tiled=tiled)(x, y).backward())
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def batch() -> None:
    """Many small problems at once and one after the other."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for problems, n in ((64, 64), (16, 128)):
        cost = torch.rand(problems, n, n, generator=generator, dtype=torch.float64)
        work: dict[str, Callable[[], object]] = {
            "ours, one batch": lambda cost=cost: sinkhorn_newton(cost, eta=300.0),
            "ours, one by one": lambda cost=cost: [sinkhorn_newton(c, eta=300.0) for c in cost],
        }
        if regot:
            uniform = np.full(n, 1 / n)
            work["regot ssns, one by one"] = lambda cost=cost, u=uniform: [
                regot.sinkhorn_ssns(np.asfortranarray(c.numpy()), u, u, 1 / 300, tol=1e-10) for c in cost
            ]
        if ot:
            uniform = np.full(n, 1 / n)
            work["POT emd, one by one"] = lambda cost=cost, u=uniform: [ot.emd(u, u, c.numpy()) for c in cost]
        seconds = harness.alternate(work, rounds=7, warmup=1)
        rows += [{"problems": f"{problems} of {n}x{n}"} | row for row in harness.ratios(seconds, "ours, one batch")]
    harness.save("sinkhorn_newton_sparse", "batches of random assignments, eta=300", rows, PACKAGES)


def backward() -> None:
    """Gradient of the transport cost: one implicit solve, against differentiating 200 unrolled Sinkhorn sweeps."""
    n = 200
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    solver = SinkhornNewton(300.0)

    def unrolled() -> None:
        log_a = -np.log(n)
        g = torch.zeros(n, dtype=torch.float64)
        for _ in range(200):
            f = log_a - torch.logsumexp(g - 300 * cost, 1)
            g = log_a - torch.logsumexp(f[:, None] - 300 * cost, 0)
        (torch.exp(f[:, None] + g - 300 * cost) * cost).sum().backward()

    work: dict[str, Callable[[], object]] = {
        "ours: forward and backward of <C, P>": lambda: solver(cost).cost.backward(),
        "ours: forward and backward of the value": lambda: solver.value(cost).backward(),
        "ours: forward only": lambda: solver(cost.detach()),
        "200 unrolled sweeps (not converged)": unrolled,
    }
    seconds = harness.alternate(work, rounds=5, warmup=1)
    rows = harness.ratios(seconds, "ours: forward and backward of <C, P>")
    harness.save("sinkhorn_newton_sparse", "gradients, n=200, eta=300", rows)


def seeds() -> None:
    """Several instances, and POT's plain sweeps, as many as reach the same error (looked for in pieces, not timed)."""
    for eta, n, number in ((ETA, 500, 5), (ETA, 1000, 5), (2 * ETA, 1000, 3)):
        rows = []
        for seed in range(number):
            problem = assignment(n, seed, eta)
            tensor = torch.from_numpy(problem.cost)
            solve = partial(sinkhorn_newton, tensor, eta=eta, tol=TARGET)
            found = [timed(solve) for _ in range(5)]
            seconds = median(s for s, _ in found)
            row = {"seed": seed, "newton steps": int(found[0][1].n_newton), "CPU s": round(seconds, 3)}
            if ot is not None:
                end = next(p for p in pot(problem, "sinkhorn", 50) if p.error <= TARGET or p.iterations >= 20_000)
                settings = {"numItermax": end.iterations, "stopThr": 0, "warn": False}
                theirs = partial(ot.sinkhorn, problem.a, problem.b, problem.cost, 1 / eta, **settings)
                ratio = median(timed(theirs)[0] for _ in range(3 if end.iterations < 5000 else 1)) / seconds
                row |= {"POT sweeps": end.iterations, "reached": end.error <= TARGET, "POT / ours": round(ratio, 1)}
            rows.append(row)
            print(n, eta, row, flush=True)
        harness.save("sinkhorn_newton_sparse", f"n={n}, eta={eta:g}, several seeds", rows, PACKAGES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    chosen = sys.argv[1:] or ["table", "seeds", "images", "large", "batch", "backward", "points"]
    if "batch" in chosen:
        batch()
    if "backward" in chosen:
        backward()
    if "table" in chosen:
        for n in (500, 1000):
            table(f"assignment, n={n}", assignment(n), 20.0, f"n={n}, to 1e-9, 20 s each")
    if "seeds" in chosen:
        seeds()
    if "images" in chosen:
        for p in (2, 1):
            table(f"digits 28x28, L{p} cost", images(p), 20.0, f"28x28 digits, L{p} cost, to 1e-9, 20 s each")
    if "large" in chosen:
        large()
    if "points" in chosen:
        points()
