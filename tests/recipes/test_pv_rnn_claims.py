"""What the recipes claim, run to their ends."""

import csv
from pathlib import Path

import pytest
import torch

from lit_methods.datamodules import SymbolicMarkovDataModule
from lit_methods.vi import PVRNN, ErrorRegression, PVRNNModule
from tests.cli import run_here

pytestmark = pytest.mark.slow


def last_logged(monkeypatch: pytest.MonkeyPatch, folder: Path, recipe: str, *options: str) -> dict[str, float]:
    torch.set_num_threads(1)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.logger.init_args.save_dir=."]
    run_here(monkeypatch, folder, "fit", "--config", f"pv_rnn/{recipe}", *quiet, *options)
    with next(folder.rglob("metrics.csv")).open() as file:
        return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}


@pytest.mark.parametrize("weight", [0.01, 0.1])
def test_the_prior_is_wide_where_the_coin_is_and_knows_its_chance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weight: float
) -> None:
    found = last_logged(monkeypatch, tmp_path, "meta_prior", f"--model.meta_prior={weight}")
    sigmas = [found[f"prior/sigma/{phase}"] for phase in range(3)]
    assert sigmas[0] > 5 * max(sigmas[1:])
    for phase in range(3):
        assert found[f"prior/above/{phase}"] == pytest.approx(found[f"data/above/{phase}"], abs=0.12)


def test_a_small_meta_prior_leaves_the_prior_untrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = last_logged(monkeypatch, tmp_path, "meta_prior", "--model.meta_prior=0.0001")
    assert max(abs(found[f"prior/above/{phase}"] - found[f"data/above/{phase}"]) for phase in range(3)) > 0.2


def test_error_regression_predicts_unseen_phases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = last_logged(monkeypatch, tmp_path, "error_regression")
    assert found["test/mse"] < 0.02
    assert found["test/mse"] < found["test/mse_prior"] / 30


def test_recognises_a_training_sequence_and_stays_finite_at_a_large_step() -> None:
    torch.manual_seed(0)
    data = SymbolicMarkovDataModule()
    data.setup("fit")
    module = PVRNNModule(PVRNN(1, [10], [1], [2.0]), 0.1, num_sequences=10, seq_len=24, seed=0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    batch = data.train_data
    for _ in range(1000):
        optimizer.zero_grad()
        loss = module.losses(batch).total().mean()  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
    regression = ErrorRegression(module.network, 24, 300, 0.1, meta_prior=0.1, restarts=4)
    found = regression.begin(batch[1]).after.mean()  # type: ignore[index]
    trained = module.losses(batch, torch.zeros(24, 10, 1)).total().mean()  # type: ignore[arg-type]
    assert found < 1.5 * trained
