"""CBO's paper recipes have the settings of the authors' scripts, and run up to the missing data."""

import math
from typing import Any

import pytest
import torch
import yaml

from lit_methods.datamodules import MNISTDataModule
from lit_methods.nets import PostNormCNN, PostNormMLP
from tests.cli import run_here
from tests.contract.pieces import ROOT
from tests.standins.idx_files import write_mnist


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / "cbo" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["paper_mnist_shallow", "paper_mnist_cnn"])
def test_mnist_settings(name) -> None:
    config = recipe(name)
    cbo = config["model"]["init_args"]["optimizer"]["init_args"]
    assert cbo["sigma"] == pytest.approx(math.sqrt(0.4), abs=1e-7)
    assert (cbo["num_particles"], cbo["batches"], cbo["lr"], cbo["lambda_"]) == (
        100,
        {"size": 10, "update": "full"},
        0.1,
        1.0,
    )
    assert cbo["alpha"] == 50 / 10  # the authors divide the cross-entropy by 10
    assert (cbo["noise"], cbo["init"]["std"]) == ("anisotropic", 1.0)
    assert config["data"]["init_args"]["batch_size"] == 60
    assert config["trainer"]["max_epochs"] == 100
    network = config["model"]["init_args"]["network"]
    build = {"PostNormMLP": PostNormMLP, "PostNormCNN": PostNormCNN}[network["class_path"].rpartition(".")[2]]
    with torch.device("meta"):
        net = build(**network["init_args"])
    assert sum(p.numel() for p in net.parameters()) == {"paper_mnist_shallow": 7850, "paper_mnist_cnn": 897}[name]


def test_canyon_settings() -> None:
    model = recipe("illustrations")["model"]["init_args"]
    cbo = model["methods"]["cbo"]["init_args"]
    assert (cbo["lr"], cbo["lambda_"], cbo["sigma"], cbo["noise"]) == (0.01, 1.0, 1.6, "isotropic")
    assert (cbo["num_particles"], cbo["alpha"], cbo["init"]["std"]) == (200, 100.0, 0.5)
    assert (model["start"], model["num_runs"], model["steps_per_epoch"]) == ([8.0, 8.0], 50, 250)
    assert model["inner_steps"]["langevin"] * model["steps_per_epoch"] == 10_000


@pytest.mark.parametrize("name", ["paper_mnist_shallow", "paper_mnist_cnn"])
def test_runs_up_to_the_missing_data_and_then_on_it(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(MNISTDataModule, "mirrors", ("http://127.0.0.1:9/",))  # nobody listens there
    run = ["fit", "--config", f"cbo/{name}", "--trainer.accelerator=cpu"]
    with pytest.raises((FileNotFoundError, SystemExit), match=r"train-images-idx3-ubyte\.gz"):
        run_here(monkeypatch, tmp_path, *run)
    write_mnist(tmp_path)
    limits = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--data.batch_size=8", "--data.data_dir=."]
    run_here(monkeypatch, tmp_path, *run, *limits)
