"""Mult-VAE's paper recipes have the settings of the authors' notebook, build, and run up to the missing data."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml

from lit_methods.datamodules import MovieLensDataModule
from lit_methods.vi import MultDAE, MultVAE
from tests.cli import run_here
from tests.contract.pieces import ROOT

SIZES = {
    "paper_ml20m": (20_108, 10_000, 200),
    "paper_netflix": (17_769, 40_000, 100),
    "paper_msd": (41_140, 50_000, 100),
}
LINKS = {"paper_ml20m": "ml-20m.zip", "paper_netflix": "combined_data_*.txt", "paper_msd": "train_triplets.txt"}


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / "mult_vae" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", SIZES)
def test_settings(name) -> None:
    config, (num_items, heldout, epochs) = recipe(name), SIZES[name]
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    optimizer = model.pop("optimizer")
    assert optimizer == {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3, "fused": True}}
    hidden = [] if name == "paper_msd" else [600]
    assert model == {
        "hidden_dims": hidden, "latent_dim": 200, "dropout": 0.5, "anneal_cap": 0.2, "total_anneal_steps": 200_000
    }  # fmt: skip
    assert (data["batch_size"], data["num_heldout_users"]) == (500, heldout)
    assert config["trainer"]["max_epochs"] == epochs
    with torch.device("meta"):
        module = MultVAE(num_items, **model)
    shapes = [tuple(p.shape) for name, p in module.named_parameters() if p.ndim == 2]
    widths = [num_items, *hidden, 400], [200, *hidden, num_items]
    assert shapes[0] == (num_items, widths[0][1])
    assert shapes[1:] == [(b, a) for dims in (widths[0][1:], widths[1]) for a, b in pairwise(dims)]


def test_dae_settings() -> None:
    config = recipe("paper_ml20m_dae")
    model = config["model"]["init_args"]
    assert model["hidden_dims"] == []
    assert model["l2_penalty"] == 0.01 / config["data"]["init_args"]["batch_size"]
    with torch.device("meta"):
        module = MultDAE(20_108, (), model["latent_dim"])
    assert sum(p.numel() for p in module.parameters()) == 2 * 20_108 * 200 + 200 + 20_108
    small = recipe("ml100k_dae")
    assert small["model"]["init_args"]["l2_penalty"] == 0.01 / small["data"]["init_args"]["batch_size"]


@pytest.mark.parametrize("name", LINKS)
def test_runs_up_to_the_missing_data(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(MovieLensDataModule, "mirrors", ("http://127.0.0.1:9/",))  # nobody listens there
    with pytest.raises(FileNotFoundError) as error:
        run_here(monkeypatch, tmp_path, "fit", "--config", f"mult_vae/{name}", "--trainer.accelerator=cpu")
    assert LINKS[name] in str(error.value)
    assert str(tmp_path) in str(error.value)
