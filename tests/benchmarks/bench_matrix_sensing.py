"""Matrix sensing: steps and time to an accuracy beside other ways to the same matrix, and the cost of a step.

    python -m tests.benchmarks.bench_matrix_sensing [accuracy] [completion] [lora] [cost]

No package solves this problem; the alternatives are written out below as their papers state them, plus the nuclear
norm by cvxpy when it is installed. (fancyimpute 0.7.0 has soft-impute, but does not run beside scikit-learn 1.9.) The
comparison of LoRA needs peft.
"""

import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from lit_methods.batches import SensingBatch
from lit_methods.datamodules import DigitsDataModule, SensingDataModule
from lit_methods.nets import MLP, LoRANetwork
from lit_methods.optim import ScaledGD
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
    def step(f: Tensor, g: Tensor, r: Tensor, t: int) -> None:
        f.grad, g.grad = r @ g, r.T @ f
        ScaledGD([f, g], lr=0.5, damping=damping).step()

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


def soft_impute(observed: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """Soft-impute (Mazumder, Hastie and Tibshirani, 2010), with a shrinkage that falls as it goes."""
    x, t = torch.zeros_like(observed), 0
    while True:
        u, s, vh = torch.linalg.svd(torch.where(mask, observed, x), full_matrices=False)
        x = u * (s - 10 ** (-t / 100)).clamp(min=0) @ vh  # falls tenfold in 100 iterations
        t += 1
        yield x


def descent(step: Step, observed: Tensor, mask: Tensor, alpha: float, k: int) -> Iterator[Tensor]:
    n = len(observed)
    generator = torch.Generator().manual_seed(0)
    f, g = (torch.randn(n, k, generator=generator, dtype=torch.float64) * alpha / n**0.5 for _ in range(2))
    g /= 3
    t = 0
    while True:
        t += 1
        step(f, g, torch.where(mask, f @ g.T - observed, 0.0) / mask.double().mean(), t)
        yield f @ g.T


def completion() -> None:
    """70 % of the entries of a 50x50 matrix of rank 3."""
    rows = []
    ways: dict[str, Callable[[Tensor, Tensor], Iterator[Tensor]]] = {
        "ours: F G^T and the one step": lambda o, m: descent(one_step, o, m, 0.05, 5),
        "F G^T, gradient descent": lambda o, m: descent(gradient_descent, o, m, 0.05, 5),
        "soft-impute": soft_impute,
    }
    for name, way in ways.items():
        steps, seconds, errors = [], [], []
        for seed in range(3):
            data = SensingDataModule(
                50, rank=3, measurements="entries", num_measurements=1750, dtype="float64", seed=seed
            )
            data.setup("fit")
            (matrix,) = data.val_data.matrix
            mask = torch.zeros(50, 50, dtype=torch.bool)
            mask[data.train_data.rows, data.train_data.columns] = True
            start = time.process_time()
            for t, x in enumerate(way(torch.where(mask, matrix, 0.0), mask), 1):
                if t % 20 == 0 and ((error := float((x - matrix).square().sum())) < TARGET or t >= CAP):
                    break
            steps.append(t)
            seconds.append(time.process_time() - start)
            errors.append(error)
        reached = f"{sum(e < TARGET for e in errors)}/3"
        rows.append(
            {"method": name, "reached": reached, "steps": median(steps), "seconds": round(median(seconds), 2)}
            | {"squared error": f"{median(errors):.1e}"}
        )
    harness.save("matrix_sensing", f"completion to a squared error of {TARGET:g}, n=50, r=3, 70 % of the entries", rows)


def lora_steps(seed: int, init_scale: float, lr: float, ratio: float = 1.0, step_at: int = 0) -> int | None:
    """Steps of gradient descent to a training loss of 0.1 on the digits; None: diverged or 2500 are too few."""
    torch.manual_seed(seed)
    data = DigitsDataModule(batch_size=2000, seed=seed)
    data.setup("fit")
    x, y = next(iter(data.train_dataloader()))
    network = LoRANetwork(MLP(64, [64, 32], 10), 32, init_scale)
    trained = [p for p in network.parameters() if p.requires_grad]
    a, b = trained[::2], trained[1::2]
    optimizer = torch.optim.SGD([{"params": a, "lr": lr}, {"params": b, "lr": ratio * lr}])
    for t in range(1, 2501):
        loss = functional.cross_entropy(network(x), y)
        if loss < 0.1:
            return t
        if not loss < 1e3:
            return None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if t == step_at:
            for left, right in zip(b, a, strict=True):
                rebalance_factors_(left.data, right.data.mT, beta=1.0)
    return None


def lora() -> None:
    """LoRA of rank 32 on a frozen random network; for each method the better of its steps, by the median of 3 seeds."""
    ways: dict[str, tuple[tuple[float, ...], dict[str, float]]] = {
        "one extra step after 50": ((0.1, 0.2), {"step_at": 50}),
        "plain": ((0.1, 0.2), {}),
        "LoRA+, ratio 4": ((0.1, 0.2), {"ratio": 4.0}),
        "LoRA+, ratio 16": ((0.05, 0.1), {"ratio": 16.0}),
    }
    rows = []
    for init_scale, (name, (rates, arguments)) in product((1.0, 0.1), ways.items()):
        found = {lr: [lora_steps(seed, init_scale, lr, **arguments) for seed in range(3)] for lr in rates}  # type: ignore[arg-type]
        lr = min(rates, key=lambda lr: median(t or 10**6 for t in found[lr]) + 10**6 * found[lr].count(None))
        rows.append({"method": name, "init_scale": init_scale, "lr": lr, "steps of 3 seeds": found[lr]})
    harness.save("matrix_sensing", "LoRA of rank 32 on digits: steps to a training loss of 0.1", rows, ("peft",))


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


SECTIONS = {"accuracy": to_accuracy, "completion": completion, "lora": lora, "cost": step_cost}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()
