"""M-FAC's step against its floor and other optimizers; static inverse-Fisher products against the recurrence.

Run ``python -m tests.benchmarks.bench_mfac [section ...]``; sections: step, iteration, training, static. Peers are
optional: pytorch-optimizer and curvlinops (see requirements.txt). Training takes Fashion-MNIST from where its
datamodule finds it.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median, stdev
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods.datamodules import FashionMNISTDataModule
from lit_methods.nets import MLP, CIFARResNet
from lit_methods.optim import MFAC, FisherInverse, collect_gradients
from lit_methods.optim.mfac.window import _solve
from tests.benchmarks import harness

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = ("lit-methods", "pytorch-optimizer", "curvlinops-for-pytorch")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 784-900-300-10": lambda: MLP(784, [900, 300], 10),
    "ResNet-20": lambda: CIFARResNet(20, in_channels=1),
}
ADAMW = "AdamW (fused)"


def save(section: str, rows: list[harness.Row]) -> None:
    harness.save("mfac", section, rows, PACKAGES)


# ---------------------------------------------------------------------------------------------------------------- step


def step() -> None:
    """One step with the paper's ResNet-20 (d = 269,722 in 65 tensors).

    The floor is the time to stream 2 m d numbers at the rate of a matrix-vector product that streams 256 MB, plus one
    m x m Cholesky solve; both are measured in every round, beside the steps.
    """
    for rows in (128, 512, 1024):
        torch.manual_seed(0)
        params = list(CIFARResNet(20).to(DEVICE).parameters())
        d = sum(p.numel() for p in params)
        for p in params:
            p.grad = torch.randn_like(p)
        variants: dict[str, dict[str, Any]] = {
            "cholesky": {},
            "rank2": {"solver": "rank2"},
            "rank2, momentum": {"solver": "rank2", "momentum": 0.9},
            "rank2, bfloat16 window": {"solver": "rank2", "history_dtype": "bfloat16"},
        }
        contenders: dict[str, harness.Work] = {
            name: MFAC(params, num_grads=rows, **options).step for name, options in variants.items()
        }
        stream = torch.ones(64, 2**20, device=DEVICE)
        vector = torch.ones(2**20, device=DEVICE)
        gram = torch.randn(rows, rows, dtype=torch.float64, device=DEVICE)
        gram = gram @ gram.t()
        ridge, newest = torch.ones(rows, dtype=torch.float64, device=DEVICE), torch.arange(rows, device=DEVICE) == 3
        contenders["stream"] = lambda stream=stream, vector=vector: stream.mv(vector)
        contenders["solve"] = lambda gram=gram, ridge=ridge, newest=newest: _solve(gram, ridge, newest)
        seconds = harness.alternate(contenders, rounds=15, warmup=3)
        streams, solves = seconds.pop("stream"), seconds.pop("solve")
        for title, names, size in (("float32", list(variants)[:3], 4), ("bfloat16", list(variants)[3:], 2)):
            passes = 2 * rows * d * size / stream.nbytes
            floor = {"floor": [passes * s + c for s, c in zip(streams, solves, strict=True)]}
            chosen = {name: seconds[name] for name in names} | floor
            if size == 4:
                chosen["solve alone"] = solves
            save(f"step, ResNet-20, m={rows}, {title} window", harness.ratios(chosen, "floor"))


# ----------------------------------------------------------------------------------------------------- other optimizers


class Contestant:
    """An optimizer, how its users drive it, and the learning rates it may choose from."""

    def __init__(
        self, build: Callable[..., torch.optim.Optimizer], lrs: list[float], second_order_every: int = 0
    ) -> None:
        self.build = build
        self.lrs = lrs
        self.second_order_every = second_order_every  # iterations between those that need create_graph=True


def contestants() -> dict[str, Contestant]:
    """Ours, fused AdamW, and pytorch-optimizer's if it is installed; periodic work every 10 iterations."""
    result = {
        ADAMW: Contestant(
            lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True, weight_decay=0.0), [3e-4, 1e-3, 3e-3, 1e-2]
        ),
        "SGD (momentum)": Contestant(
            lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9), [0.01, 0.03, 0.1, 0.3]
        ),
        "MFAC m=32": Contestant(
            lambda params, lr: MFAC(params, lr=lr, momentum=0.9, num_grads=32, damping=1e-3), [1e-3, 3e-3, 1e-2, 3e-2]
        ),
        "MFAC m=128": Contestant(
            lambda params, lr: MFAC(params, lr=lr, momentum=0.9, num_grads=128, damping=1e-3), [3e-4, 1e-3, 3e-3, 1e-2]
        ),
    }
    po = harness.peer("pytorch_optimizer")
    if po is not None:
        result |= {
            "SOAP": Contestant(
                lambda params, lr: po.SOAP(params, lr=lr, precondition_frequency=10, weight_decay=0.0),
                [3e-4, 1e-3, 3e-3, 1e-2],
            ),
            "Shampoo": Contestant(
                lambda params, lr: po.Shampoo(params, lr=lr, preconditioning_compute_steps=10), [0.01, 0.03, 0.1, 0.3]
            ),
            "SophiaH": Contestant(
                lambda params, lr: po.SophiaH(params, lr=lr, update_period=10), [3e-3, 1e-2, 3e-2, 1e-1], 10
            ),
        }
    return result


def batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    data = FashionMNISTDataModule(val_size=0)
    data.setup("fit")
    images, labels = data.train_data
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(labels), generator=generator).split(size):
            yield (images[rows].float() / 255).to(DEVICE), labels[rows].to(DEVICE)


class Run:
    """One training run that can be advanced an iteration at a time."""

    def __init__(self, network: str, contestant: Contestant, lr: float, seed: int, batch_size: int = 128) -> None:
        torch.manual_seed(seed)
        self.net = NETWORKS[network]().to(DEVICE)
        self.contestant = contestant
        self.optimizer = contestant.build(self.net.parameters(), lr=lr)
        self.batches = batches(batch_size, seed)
        self.iteration = 0

    def __call__(self) -> float:
        x, y = next(self.batches)
        every = self.contestant.second_order_every
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.net(x), y)
        loss.backward(create_graph=bool(every) and self.iteration % every == 0)
        self.optimizer.step()
        self.iteration += 1
        return float(loss.detach())

    def state_bytes_per_parameter(self) -> float:
        tensors: list[Tensor] = []
        stack: list[Any] = list(self.optimizer.state.values())
        while stack:
            value = stack.pop()
            if isinstance(value, Tensor):
                tensors.append(value)
            elif isinstance(value, dict):
                stack += value.values()
            elif isinstance(value, list | tuple):
                stack += value
        return sum(t.nbytes for t in tensors) / sum(p.numel() for p in self.net.parameters())


def iteration() -> None:
    """Ten training iterations (batch 128) at a time, so that periodic work counts in proportion; optimizer state."""
    for network in NETWORKS:
        runs = {name: Run(network, c, c.lrs[0], seed=0) for name, c in contestants().items()}

        def ten(run: Run) -> None:
            for _ in range(10):
                run()

        rounds = 7 if network.startswith("MLP") else 3
        work = {name: (lambda run=run: ten(run)) for name, run in runs.items()}
        table = harness.ratios(harness.alternate(work, rounds=rounds, warmup=1), ADAMW)
        for row in table:
            row["median_ms"] = round(row["median_ms"] / 10, 2)
            row["state_bytes_per_parameter"] = round(runs[row["name"]].state_bytes_per_parameter(), 1)
        save(f"training iteration, {network}, batch 128", table)


def training() -> None:
    """Training loss (mean of the last 20 mini-batches) after equal steps, and after the time AdamW takes for them.

    The learning rate is the best of four by the loss after equal steps with seed 0; then three seeds (ResNet: one).
    Time is the process's CPU time of the iterations, so that other users of the machine do not count.
    """
    for network, steps, seeds in (("MLP 784-900-300-10", 400, (0, 1, 2)), ("ResNet-20", 50, (0,))):
        curves: dict[str, list[tuple[list[float], list[float]]]] = {}
        lrs: dict[str, float] = {}
        for name, contestant in contestants().items():
            trials = {lr: train(Run(network, contestant, lr, 0), steps) for lr in contestant.lrs}
            lrs[name] = min(trials, key=lambda lr: nan_last(smooth(trials[lr][0], steps)))
            curves[name] = [trials[lrs[name]]]
            curves[name] += [train(Run(network, contestant, lrs[name], seed), steps) for seed in seeds[1:]]
        rows = []
        for name, runs in curves.items():
            at_steps = [smooth(losses, steps) for losses, _ in runs]
            budgets = [clock[-1] for _, clock in curves[ADAMW]]
            done = [sum(t <= b for t in clock) for (_, clock), b in zip(runs, budgets, strict=True)]
            at_time = [smooth(losses, n) for (losses, _), n in zip(runs, done, strict=True)]
            rows.append(
                {
                    "name": name,
                    "lr": lrs[name],
                    "loss_at_equal_steps": round(median(at_steps), 4),
                    "spread": round(stdev(at_steps), 4) if len(at_steps) > 1 else None,
                    "steps_in_equal_time": round(median(done)),
                    "loss_at_equal_time": round(median(at_time), 4),
                }
            )
        save(f"training loss, {network} on Fashion-MNIST, {steps} steps of 128", rows)


def train(run: Run, steps: int) -> tuple[list[float], list[float]]:
    """Losses and CPU seconds after each step; a run whose optimizer breaks down has infinite losses from there on."""
    losses, clock, start = [], [], time.process_time()
    for _ in range(steps):
        try:
            losses.append(run())
        except torch.linalg.LinAlgError:
            losses.append(float("inf"))
        clock.append(time.process_time() - start)
    return losses, clock


def nan_last(loss: float) -> float:
    return float("inf") if math.isnan(loss) else loss


def smooth(losses: list[float], steps: int) -> float:
    last = losses[max(0, steps - 20) : steps]
    return sum(last) / len(last) if last else float("nan")


# -------------------------------------------------------------------------------------------------------------- static


def recurrence(grads: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The paper's recurrence on blocks (blocks, m, b): the vectors v and the denominators."""
    m = grads.shape[1]
    v = grads / damping
    s = torch.zeros(grads.shape[:2], device=grads.device)
    for i in range(m):
        if i:
            weights = torch.bmm(v[:, :i], grads[:, i, :, None])[:, :, 0] / s[:, :i]
            v[:, i] -= torch.bmm(weights[:, None], v[:, :i])[:, 0]
        s[:, i] = m + (v[:, i] * grads[:, i]).sum(-1)
    return v, s


def recurrence_diagonal(grads: Tensor, damping: float) -> Tensor:
    v, s = recurrence(grads, damping)
    return (1 / damping - (v.square() / s[:, :, None]).sum(1)).flatten()


def error(diagonal: Tensor, exact: Tensor) -> float:
    return float(f"{float((diagonal.double() / exact - 1).abs().max()):.1e}")


def static() -> None:
    """Diagonals, and products with curvlinops' operators; the errors are the largest relative ones."""
    torch.manual_seed(0)
    rows, block, damping = 1024, 128, 1e-5
    grads = torch.randn(rows, 4 * block, device=DEVICE) / 10
    blocks = grads.view(rows, -1, block).transpose(0, 1).contiguous()
    exact = FisherInverse.from_gradients(grads.double(), damping, block).diagonal()
    contenders: dict[str, harness.Work] = {
        "blocked": lambda: FisherInverse.from_gradients(grads, damping, block).diagonal(),
        "blocked, float64 gradients": lambda: FisherInverse.from_gradients(grads.double(), damping, block).diagonal(),
        "recurrence, 4 blocks at once": lambda: recurrence_diagonal(blocks, damping),
        "recurrence, block by block": lambda: torch.cat([recurrence_diagonal(b[None], damping) for b in blocks]),
    }
    table = harness.ratios(harness.alternate(contenders, rounds=9, warmup=1), "blocked")
    for row in table:
        row["error"] = error(contenders[row["name"]](), exact)  # type: ignore[arg-type]
    save(f"diagonal, 4 blocks of b={block}, m={rows}", table)

    for rows in (256, 1024):
        grads = torch.randn(rows, 8192, device=DEVICE) / 10
        exact = FisherInverse.from_gradients(grads.double(), damping).diagonal()
        contenders = {
            "full": lambda grads=grads: FisherInverse.from_gradients(grads, damping).diagonal(),
            "recurrence": lambda grads=grads: recurrence_diagonal(grads[None], damping),
        }
        table = harness.ratios(harness.alternate(contenders, rounds=5, warmup=1), "full")
        for row in table:
            row["error"] = error(contenders[row["name"]](), exact)  # type: ignore[arg-type]
        save(f"diagonal, full matrix, d=8192, m={rows}", table)

    if harness.peer("curvlinops") is not None:
        products()


def products() -> None:
    """F⁻¹v for the per-sample empirical Fisher of an MLP: ours against conjugate gradients on curvlinops' operator."""
    from curvlinops import CGInverseLinearOperator, EFLinearOperator
    from curvlinops.examples import IdentityLinearOperator

    damping = 1e-2
    torch.manual_seed(0)
    net = MLP(784, [128], 10).to(DEVICE)
    x, y = next(batches(256, 0))
    params = [p for p in net.parameters() if p.requires_grad]
    vector = torch.randn(sum(p.numel() for p in params), device=DEVICE)

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    def build() -> FisherInverse:
        grads = collect_gradients(net, loss_fn, [(x, y)], 256, params, batch_size_per_grad=1)
        return FisherInverse.from_gradients(grads, damping)

    inverse = build()
    data = [(x, y)]
    fisher = EFLinearOperator(net, nn.CrossEntropyLoss(), params, data, check_deterministic=False)
    shapes = [tuple(p.shape) for p in params]
    damped = fisher + damping * IdentityLinearOperator(shapes, vector.device, vector.dtype)
    contenders: dict[str, harness.Work] = {
        "ours, gradients and factor included": lambda: build().matvec(vector),
        "ours, further vectors": lambda: inverse.matvec(vector),
    }
    for iterations in (10, 100):
        solver = CGInverseLinearOperator(damped, max_iter=iterations, max_tridiag_iter=0, tolerance=1e-6)
        contenders[f"curvlinops EF + CG, at most {iterations} iterations"] = lambda solver=solver: solver @ vector
    table = harness.ratios(harness.alternate(contenders, rounds=5, warmup=1), "ours, gradients and factor included")
    for row in table:
        result: Any = contenders[row["name"]]()
        residual = damped @ result - vector
        row["relative_residual"] = float(f"{float(residual.norm() / vector.norm()):.1e}")
    save(f"F⁻¹v, MLP 784-128-10 (d={len(vector)}), 256 per-sample gradients", table)


SECTIONS = {function.__name__: function for function in (step, iteration, training, static)}

if __name__ == "__main__":
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()
