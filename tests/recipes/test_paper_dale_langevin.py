"""The paper recipes have the authors' settings, build on the meta device, and run up to the missing data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_methods.datamodules import FashionMNISTDataModule
from lit_methods.diffusion import DiscreteTimes, GeometricBrownian, NoiseVariance, UNet2D
from tests.cli import run_here
from tests.contract.pieces import ROOT

# The table of the samplers in the authors' code: delta, inner steps and decay of the noise of DLS.
SETTINGS = {
    "mnist": (6.1654545e-4, 1, 0.995),
    "fashion_mnist": (5.8627e-4, 1, 0.995),
    "kmnist": (2.1131579e-4, 3, 0.995),
    "cifar10": (1.142105e-4, 6, 0.9995),
}


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / "dale_langevin" / f"paper_{name}.yaml").read_text())


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_the_authors(name: str) -> None:
    config = recipe(name)
    model, colour = config["model"]["init_args"], name == "cifar10"
    delta, inner_steps, decay = SETTINGS[name]
    annealing = {"delta": delta, "inner_steps": inner_steps, "noise_decay": decay, "polish_steps": 0}
    assert model["sampling"]["solver"]["init_args"] == {"annealing": annealing}
    assert model["sampling"]["steps"] == 1000
    assert GeometricBrownian(**model["process"]) == GeometricBrownian(0.32, 0.8, 1.0, 1e-3)
    assert (model["prediction"], model["network_input"]) == ("stein", "x")
    assert model["weighting"]["class_path"].endswith(NoiseVariance.__name__)
    assert model["time_sampler"]["class_path"].endswith(DiscreteTimes.__name__)
    assert model["optimizer"]["init_args"]["lr"] == (2e-4 if colour else 1e-4)
    assert config["data"]["init_args"]["batch_size"] == 128
    assert config["trainer"]["max_steps"] == (1_300_000 if colour else 300_001)
    assert config["trainer"].get("gradient_clip_val") == (1.0 if colour else None)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_network_builds(name: str) -> None:
    model = recipe(name)["model"]["init_args"]
    with torch.device("meta"):
        net = UNet2D(**model["net"]["init_args"])
        shape = (2, *model["shape"])
        assert net(torch.empty(shape), torch.empty(2)).shape == shape


@pytest.mark.parametrize("name", SETTINGS)
def test_runs_up_to_the_missing_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_methods.datamodules.download.urlopen", _no_network)
    monkeypatch.setattr(FashionMNISTDataModule, "system_dir", None)
    channels = recipe(name)["model"]["init_args"]["shape"][0]
    small = json.dumps(
        {
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": [32],
            "down_block_types": ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"],
        }
    )
    options = [f"--model.net.init_args.model={small}", "--trainer.max_steps=1"]
    with pytest.raises(FileNotFoundError, match="lacks"):
        run_here(monkeypatch, tmp_path, "fit", "--config", f"dale_langevin/paper_{name}", *options)


def _no_network(*args: Any, **kwargs: Any) -> None:
    raise OSError("no network")
