"""The paper recipes have the settings of the authors' laboratory, build, and run on data of that shape."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.cli import run_here
from tests.contract.pieces import ROOT


@pytest.mark.parametrize(
    ("name", "shape", "low", "high", "sizes", "epochs"),
    [
        ("branching", (60, 30, 2), 0, 1, ([20, 10], [2, 1], [4, 8]), 50_000),
        ("robot", (120, 80, 17), -30, 120, ([30, 20, 10], [3, 2, 1], [2, 4, 8]), 100_000),
    ],
)
def test_recipe(
    name: str, shape: tuple[int, ...], low: float, high: float, sizes: tuple[list[int], ...], epochs: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = yaml.safe_load((ROOT / "recipes" / "pv_rnn" / f"paper_{name}.yaml").read_text())
    network = config["model"]["init_args"]["network"]["init_args"]
    assert tuple(network[key] for key in ("hidden_sizes", "latent_sizes", "time_constants")) == sizes
    assert network["output"]["init_args"]["units"] == 10
    assert config["trainer"]["max_epochs"] == epochs
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-3
    options = ["fit", "--config", f"pv_rnn/paper_{name}", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    with pytest.raises(FileNotFoundError, match=f"{name}.npy"):
        run_here(monkeypatch, tmp_path, *options)
    values = np.random.default_rng(0).uniform(low, high, shape).astype(np.float32)
    np.save(tmp_path / f"{name}.npy", values[:8])
    run_here(monkeypatch, tmp_path, *options)
