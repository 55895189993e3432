"""Matrix sensing: steps and time to an accuracy beside other ways to the same matrix, and the cost of a step.

    python -m tests.benchmarks.bench_matrix_sensing

No package solves this problem; the alternatives are written out below as their papers state them, plus the nuclear
norm by cvxpy when it is installed.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from lit_methods.batches import SensingBatch
from lit_methods.datamodules import SensingDataModule
from lit_methods.sensing import AsymmetricSensing, SymmetricSensing, rebalance_factors_
from tests.benchmarks import harness

TARGET = 1e-10  # squared Frobenius error
CAP = 3000
LR = 0.1
Step = Callable[[Tensor, Tensor, Tensor, int], None]


def problem(rows: int, rank: int, measurements: int) -> tuple[SensingBatch, Tensor]:
    """A batch with all measurements, and the matrix."""
    data = SensingDataModule(rows, rank=rank, num_measurements=measurements, dtype="float64")
    data.setup("fit")
    return data.train_data, data.val_data.matrix[0]


def gradient_descent(f: Tensor, g: Tensor, r: Tensor, t: int) -> None:
    new_f = f - LR * r @ g
    g.sub_(LR * r.T @ f)
    f.copy_(new_f)


def one_step(f: Tensor, g: Tensor, r: Tensor, t: int) -> None:
    gradient_descent(f, g, r, t)
    if t == 400:
        rebalance_factors_(f, g, beta=0.5)


def scaled(damping: float) -> Step:
    """ScaledGD(lambda), Tong, Ma and Chi (2021) with the damping of Xu et al. (2023)."""

    def step(f: Tensor, g: Tensor, r: Tensor, t: int) -> None:
        eye = damping * torch.eye(f.shape[1], dtype=f.dtype)
        new_f = f - 0.5 * torch.linalg.solve(g.T @ g + eye, (r @ g).T).T
        g.sub_(0.5 * torch.linalg.solve(f.T @ f + eye, (r.T @ f).T).T)
        f.copy_(new_f)

    return step


def balanced(f: Tensor, g: Tensor, r: Tensor, t: int) -> None:
    """Gradient descent with the balancing penalty 1/8 |F^T F - G^T G|^2 (Tu et al., 2016)."""
    difference = 0.5 * (f.T @ f - g.T @ g)
    new_f = f - LR * (r @ g + f @ difference)
    g.sub_(LR * (r.T @ f - g @ difference))
    f.copy_(new_f)


def symmetric(f: Tensor, g: Tensor, r: Tensor, t: int) -> None:
    f.sub_(LR * r @ f)
    g.copy_(f)


def run(step: Step, batch: SensingBatch, matrix: Tensor, alpha: float, k: int, seed: int) -> tuple[int, float, float]:
    """Steps and seconds to ``TARGET`` (or ``CAP`` steps), and the squared error there."""
    n = len(matrix)
    generator = torch.Generator().manual_seed(seed)
    f, g = (torch.randn(n, k, generator=generator, dtype=torch.float64) * alpha / n**0.5 for _ in range(2))
    g = f.clone() if step is symmetric else g / 3
    a = batch.matrices.flatten(1)
    error, start = float("inf"), time.perf_counter()
    for t in range(1, CAP + 1):
        residual = a.T @ (a @ (f @ g.T).flatten() - batch.values) / len(a)
        step(f, g, residual.reshape(n, n), t)
        if t % 20 == 0 and (error := float((f @ g.T - matrix).square().sum())) < TARGET:
            break
    return t, time.perf_counter() - start, error


def to_accuracy() -> None:
    batch, matrix = problem(20, 2, 600)
    ways: dict[str, Step] = {
        "ours: F G^T and the one step": one_step,
        "F G^T, gradient descent": gradient_descent,
        "X X^T, gradient descent": symmetric,
        "F G^T, balancing penalty": balanced,
        **{f"ScaledGD, damping {d:g}": scaled(d) for d in (1e-1, 1e-2)},
    }
    rows = []
    for name, step in ways.items():
        for alpha in (0.5, 0.2, 0.05):
            results = [run(step, batch, matrix, alpha, 4, seed) for seed in range(3)]
            steps, seconds, errors = zip(*results, strict=True)
            reached = sum(e < TARGET for e in errors)
            rows.append(
                {
                    "method": name,
                    "alpha": alpha,
                    "reached": f"{reached}/3",
                    "steps": sorted(steps)[1],
                    "seconds": round(sorted(seconds)[1], 2),
                    "squared error": f"{sorted(errors)[1]:.1e}",
                }
            )
    if cp := harness.peer("cvxpy"):
        x = cp.Variable((20, 20), PSD=True)
        a, y = batch.matrices.flatten(1).numpy(), batch.values.numpy()
        start = time.perf_counter()
        cp.Problem(cp.Minimize(cp.trace(x)), [a @ cp.vec(x, order="C") == y]).solve(solver=cp.CLARABEL)
        error = float((torch.from_numpy(x.value) - matrix).square().sum())
        seconds = round(time.perf_counter() - start, 2)
        rows.append(
            {"method": "nuclear norm, cvxpy (Clarabel)", "reached": f"{int(error < TARGET)}/1", "seconds": seconds}
            | {"squared error": f"{error:.1e}"}
        )
    harness.save("matrix_sensing", f"to a squared error of {TARGET:g}, n=20, r=2, k=4, m=600", rows, ("cvxpy",))


def step_cost() -> None:
    """Four initial scales in one module against four modules, and against one pass over the measurements and back."""
    batch, _ = problem(50, 3, 2500)
    a = batch.matrices.flatten(1)
    vector, vector_t = torch.ones(a.shape[1], dtype=a.dtype), torch.ones(len(a), dtype=a.dtype)
    scales = (1.0, 0.5, 0.2, 0.1)

    def stepper(module: torch.nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        module.double().log = lambda *_, **__: None  # type: ignore[assignment, method-assign, operator]

        def step() -> None:
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()

        return step

    together = stepper(AsymmetricSensing(50, 50, 5, scales))
    apart = [stepper(AsymmetricSensing(50, 50, 5, (s,))) for s in scales]
    contenders = {
        "4 initial scales, one module": together,
        "4 modules, one scale each": lambda: [step() for step in apart],
        "1 module, one scale": apart[0],
        "symmetric, one scale": stepper(SymmetricSensing(50, 5, (0.1,))),
        "floor: A v and A^T v": lambda: (a @ vector, a.T @ vector_t),
    }
    seconds = harness.alternate(contenders, rounds=15)
    rows = harness.ratios(seconds, "floor: A v and A^T v")
    harness.save("matrix_sensing", "one step, n=50, k=5, m=2500, float64", rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    to_accuracy()
    step_cost()
