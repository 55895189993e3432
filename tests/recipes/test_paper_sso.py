"""SSO's paper recipes have the settings of the authors' configurations, and run up to the missing data."""

import math
from typing import Any

import pytest
import yaml

from lit_methods.datamodules import MNISTDataModule
from tests.cli import run_here
from tests.contract.pieces import ROOT


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / "sso" / f"{name}.yaml").read_text())


def test_libsvm_settings() -> None:
    config = recipe("paper_libsvm")
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model["network"]["init_args"] == {"in_features": 112, "hidden_features": [], "out_features": 1}
    sso = model["optimizer"]["init_args"]
    assert sso["rule"]["class_path"] == "lit_methods.optim.sso.Armijo"
    assert sso["rule"]["init_args"] == {"c": 0.5, "decay": 0.9, "grow": 2.0, "bounds": [1e-4, 1e4]}
    assert sso["inner"]["class_path"] == "lit_methods.optim.sso.ArmijoDescent"
    inner = sso["inner"]["init_args"]
    assert (inner["armijo_c"], inner["lr"], inner["steps"]) == (0.1, 10.0, 10)
    batches = math.ceil(8124 / data["batch_size"])
    assert data["batch_size"] == 125
    assert inner["grow"] == pytest.approx(2 ** (1 / batches), abs=1e-5)
    assert config["trainer"]["max_epochs"] == 500


def test_mnist_settings() -> None:
    config = recipe("paper_mnist")
    network = config["model"]["init_args"]["network"]["init_args"]
    assert network == {"in_features": 784, "hidden_features": [512, 256], "out_features": 10, "activation": "ReLU"}
    assert config["data"]["init_args"]["val_size"] == 0


def test_matrix_factorization_settings() -> None:
    config = recipe("paper_matrix_factorization")
    assert config["model"]["init_args"]["network"]["init_args"]["bias"] is False
    sizes = config["data"]["init_args"]
    assert (sizes["num_samples"], sizes["in_features"], sizes["out_features"], sizes["batch_size"]) == (
        1000,
        6,
        10,
        1000,
    )


def test_imitation_settings() -> None:
    config = recipe("paper_imitation")
    data, sso = config["data"]["init_args"], config["model"]["init_args"]["optimizer"]["init_args"]
    assert (data["env"], data["samples_per_round"], data["beta"], data["actions"]) == ("Hopper-v5", 1000, 0.0, "tanh")
    assert config["model"]["init_args"]["policy"]["init_args"]["hidden_features"] == [2048]
    assert (sso["rule"], sso["lr"]) == ("adagrad", 50.0)
    assert sso["inner"]["init_args"]["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        ("paper_libsvm", [], "data/libsvm/mushrooms"),
        ("paper_mnist", [], "train-images-idx3-ubyte.gz"),
        ("paper_imitation", [], "data/hopper_sac_actor.pt"),
    ],
)
def test_runs_up_to_the_missing_data(name, options, missing, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(MNISTDataModule, "mirrors", ("http://127.0.0.1:9/",))  # nobody listens there
    with pytest.raises((FileNotFoundError, SystemExit)) as error:
        run_here(monkeypatch, tmp_path, "fit", "--config", f"sso/{name}", "--trainer.accelerator=cpu", *options)
    assert missing in str(error.value) + capsys.readouterr().err


def test_matrix_factorization_needs_no_data(tmp_path, monkeypatch) -> None:
    run_here(monkeypatch, tmp_path, "fit", "--config", "sso/paper_matrix_factorization", "--trainer.max_epochs=2")
