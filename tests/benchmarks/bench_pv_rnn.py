"""PV-RNN beside its equations written layer by layer, beside encoders, and with several meta-priors.

    python -m tests.benchmarks.bench_pv_rnn [epoch | recognition | prediction | meta_prior]

``epoch``: forward and backward pass; ``recognition``: updates of error regression a second; ``prediction``: errors of
equal-sized models on sines and on primitives; ``meta_prior``: the recipe of that name, swept, and its figure.
"""

import csv
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lit_methods.cli import main
from lit_methods.datamodules import PrimitiveSwitchDataModule, SinesDataModule
from lit_methods.vi import PVRNN, ErrorRegression, PVRNNModule
from lit_methods.vi.pv_rnn import VRNN
from tests.benchmarks import harness
from tests.unit.vi.pv_rnn.naive import naive_posterior, naive_step

PACKAGES = ("lit-methods",)


def epoch() -> None:
    """64 sequences of 100 steps, three layers of 140 units and 14 latents in all, one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = PVRNN(17, [80, 40, 20], [8, 4, 2], [2.0, 4.0, 8.0])
    adaptive = torch.zeros(64, 100, 28, requires_grad=True)
    eps = torch.randn(100, 64, 14)

    def naive(step: Callable[..., Any] = naive_step) -> None:
        means, kl, _ = naive_posterior(network, adaptive, eps, step=step)
        (means.square().sum() + kl.sum()).backward()

    def ours() -> None:
        out = network.posterior(adaptive, eps=eps)
        (out.mean.square().sum() + out.kl.sum()).backward()

    weight, x, gates = network.weight, torch.randn(64, 140), torch.randn(64, 196)

    def products() -> None:
        """Those that the loop cannot do without: one forward, two backward for each step."""
        for _ in range(100):
            x @ weight.T
            gates @ weight
            gates.T @ x

    contenders: dict[str, Callable[[], object]] = {
        "ours": ours,
        "layer by layer": naive,
        "layer by layer, torch.compile of a step": partial(naive, torch.compile(naive_step)),
        "floor: products": products,
    }
    rows = harness.ratios(harness.alternate(contenders, rounds=9, clock=time.process_time), "ours")
    harness.save("pv_rnn", "one epoch, 64 x 100 steps, D = 140, Z = 14, CPU time", rows, PACKAGES)


def recognition() -> None:
    """Window 10, 50 iterations."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = PVRNN(2, [40, 20], [2, 1], [2.0, 8.0])
    rows = []
    for streams in (1, 32, 256):
        regression = ErrorRegression(network)
        values = torch.rand(30, streams, 2) - 0.5
        for x in values[:10]:
            regression.update(x)
        times = []
        for x in values[10:20]:
            start = time.process_time()
            regression.update(x)
            times.append(time.process_time() - start)
        one = median(times)
        rows.append({"streams": streams, "ms an update": round(1e3 * one, 1), "streams a second": round(streams / one)})
    harness.save("pv_rnn", "error regression, window 10, 50 iterations, D = 60, CPU time", rows, PACKAGES)


class LSTM(nn.Module):
    """Predicts the next observation; what it predicted is what it reads when it goes on."""

    def __init__(self, numbers: int, hidden: int) -> None:
        super().__init__()
        self.lstm, self.readout = nn.LSTM(numbers, hidden, batch_first=True), nn.Linear(hidden, numbers)

    def loss(self, values: Tensor) -> Tensor:
        states, _ = self.lstm(values[:, :-1])
        return (self.readout(states).tanh() - values[:, 1:]).square().mean()

    def predict(self, values: Tensor, steps: int) -> Tensor:
        states, carried = self.lstm(values)
        found = [self.readout(states[:, -1:]).tanh()]
        for _ in range(steps - 1):
            states, carried = self.lstm(found[-1], carried)
            found.append(self.readout(states).tanh())
        return torch.cat(found, 1)


def prediction(seeds: int = 3) -> None:
    """Mean squared error of the steps after the window, of unseen series."""
    torch.set_num_threads(1)
    sines: Any = partial(PVRNN, 1, [12], [2], [2.0])
    figures: Any = partial(PVRNN, 2, [40, 20], [2, 1], [2.0, 8.0])
    _predict("sines", SinesDataModule, sines, window=8, weight=0.01, seeds=seeds)
    _predict("primitives", PrimitiveSwitchDataModule, figures, window=12, weight=0.005, seeds=seeds)


def _predict(title: str, make_data: Any, make_network: Any, window: int, weight: float, seeds: int) -> None:
    epochs, samples = 1500, 10
    rows: dict[str, dict[str, Any]] = {}
    for seed in range(seeds):
        L.seed_everything(seed, verbose=False)
        data = make_data(seed=seed)
        data.setup("fit")
        train, seen, future = data.train_data, data.test_data.values[:, :window], data.test_data.values[:, window:]
        count, steps, numbers = future.shape
        network = make_network()
        parameters = size(network) - int((network.weight_mask == 0).sum()) - int((network.latent_mask == 0).sum())
        module = PVRNNModule(network, weight, num_sequences=len(train.rows), seq_len=train.values.shape[1])
        fit(module, lambda module=module, train=train: module.losses(train).total().mean(), epochs)
        regression = ErrorRegression(network, window, 100, 0.1, meta_prior=weight)
        regression.begin(seen)
        free = network.generate(window + steps, samples * count).mean[:, window:]
        guesses = {
            "PV-RNN, error regression": (parameters, regression.predict(steps, samples).mean(0)),
            "PV-RNN, no recognition": (parameters, free.unflatten(0, (samples, count)).mean(0)),
        }
        vrnn = of_size(parameters, lambda hidden, numbers=numbers: VRNN(numbers, hidden))
        fit(vrnn, lambda vrnn=vrnn, train=train: vrnn.loss(train.values, None, weight).mean(), epochs)
        lstm = of_size(parameters, lambda hidden, numbers=numbers: LSTM(numbers, hidden))
        fit(lstm, lambda lstm=lstm, train=train: lstm.loss(train.values), epochs)
        with torch.no_grad():
            runs = [vrnn.generate(steps, vrnn.recognise(seen)) for _ in range(samples)]
            guesses["VRNN, encoder"] = size(vrnn), torch.stack(runs).mean(0)
            guesses["LSTM"] = size(lstm), lstm.predict(seen, steps)
        for name, (parameters, guess) in guesses.items():
            row = rows.setdefault(name, {"model": name, "parameters": parameters, "mse of each seed": []})
            row["mse of each seed"].append(round((guess - future).square().mean().item(), 4))
    found = [row | {"mean": round(mean(row["mse of each seed"]), 4)} for row in rows.values()]
    harness.save("pv_rnn", f"{title}: error after a window of {window} steps, {epochs} epochs", found, PACKAGES)


def of_size(parameters: int, make: Callable[[int], Any]) -> Any:
    """The smallest that has as many parameters."""
    return next(network for network in map(make, range(2, 300)) if size(network) >= parameters)


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def fit(network: nn.Module, loss: Callable[[], Tensor], epochs: int) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def meta_prior(seeds: int = 3) -> None:
    """The recipe with five meta-priors; the figure goes beside it."""
    first = ["--model.initial_meta_prior=0.001", "--trainer.max_epochs=2500"]
    settings = {"0.0001": [], "0.01": [], "0.1": [], "1": [], "1, first 0.001": first}
    rows, drawn = [], {}
    for name, more in settings.items():
        weight = f"--model.meta_prior={name.partition(',')[0]}"
        runs = [
            last_logged([weight, f"--seed_everything={seed}", f"--data.seed={seed}", *more]) for seed in range(seeds)
        ]
        over_seeds = {key: [run[key] for run in runs] for key in runs[0]}
        row: dict[str, Any] = {"meta-prior": name}
        for key in ("prior/sigma", "prior/above", "data/above"):
            row[f"{key} by phase"] = [round(mean(over_seeds[f"{key}/{phase}"]), 3) for phase in range(3)]
        row["prior/memorised of each seed"] = [round(share, 2) for share in over_seeds["prior/memorised"]]
        rows.append(row)
        drawn[name] = row["prior/sigma by phase"], row["prior/above by phase"]
    harness.save("pv_rnn", f"meta-prior, a coin of period 3, means of {seeds} seeds", rows, PACKAGES)
    draw(drawn)


def last_logged(arguments: list[str]) -> dict[str, float]:
    """Run the recipe; what was last logged under every name."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--trainer.enable_progress_bar=false", f"--trainer.logger.init_args.save_dir={folder}"]
        sys.argv = ["lit-methods", "fit", "--config", "pv_rnn/meta_prior", *arguments, *quiet]
        main()
        with next(Path(folder).rglob("metrics.csv")).open() as file:
            return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}


def draw(found: dict[str, tuple[list[float], list[float]]]) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, phase in enumerate(("coin: 1 with probability 0.3", "always 0", "always 1")):
        left.semilogy(list(found), [sigma[i] for sigma, _ in found.values()], marker="o", label=phase)
        right.plot(list(found), [above[i] for _, above in found.values()], marker="o", label=phase)
    left.set_ylabel("prior sigma")
    right.set_ylabel("share of ones in free runs")
    for axes in (left, right):
        axes.set_xlabel("meta-prior")
    left.legend(fontsize=8)
    figure.savefig(Path(__file__).parents[2] / "recipes" / "pv_rnn" / "meta_prior.png", dpi=110)


if __name__ == "__main__":
    chosen = {"epoch": epoch, "recognition": recognition, "prediction": prediction, "meta_prior": meta_prior}
    for name in sys.argv[1:] or chosen:
        chosen[name]()
