"""The paper recipe has the authors' settings, builds, and runs up to the missing data."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_methods.datamodules import MNISTDataModule
from lit_methods.vi import DiagonalDiffusion, VideoDecoder, VideoEncoder
from tests.cli import run_here
from tests.contract.pieces import ROOT


def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / "fractional_sde" / "paper_moving_mnist.yaml").read_text())


def test_settings_are_the_authors() -> None:
    model, data = config()["model"]["init_args"], config()["data"]["init_args"]
    sde = model["sde"]["init_args"]
    assert sde["noise"]["init_args"] == {"num_ou": 5, "gamma_max": 10.0, "time_horizon": 2.4, "kind": "I"}
    assert (sde["state_dim"], sde["method"]) == (6, "milstein")
    assert data["dt"] / sde["dt"] == pytest.approx(3)
    assert {sde[part]["init_args"]["hidden_dims"] == [200, 200] for part in ("drift", "diffusion", "control")} == {True}
    assert sde["control"]["init_args"]["context_dim"] == 64
    assert model["obs_std"] ** 2 == pytest.approx(0.5)  # squared errors without a factor
    assert model["optimizer"]["init_args"]["lr"] == 3e-4
    assert (data["size"], data["digit_size"], data["num_frames"], data["num_digits"]) == (64, 32, 25, 2)
    assert (data["batch_size"], data["max_speed"]) == (32, 4)
    assert config()["trainer"]["max_epochs"] == 100
    assert data["train_size"] == 1875 * 32


def test_the_networks_build() -> None:
    model = config()["model"]["init_args"]
    with torch.device("meta"):
        encoder = VideoEncoder(**model["encoder"]["init_args"])
        decoder = VideoDecoder(**model["decoder"]["init_args"])
        diffusion = DiagonalDiffusion(**model["sde"]["init_args"]["diffusion"]["init_args"])
        frames = torch.empty(2, 25, 1, 64, 64)
        found = encoder(torch.empty(25), frames, torch.empty(2, 25, dtype=torch.bool))
        assert decoder(torch.empty(2, 25, 6), found.content).shape == frames.shape
        assert diffusion(torch.empty(2, 6), torch.empty(())).shape == (2, 6)
    assert [block[0].out_channels for block in encoder.frames[:4]] == [64, 128, 256, 256]


def test_runs_up_to_the_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("lit_methods.datamodules.download.urlopen", no_network)
    monkeypatch.setattr(MNISTDataModule, "system_dir", None)
    options = ["--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    with pytest.raises(FileNotFoundError, match="lacks"):
        run_here(monkeypatch, tmp_path, "fit", "--config", "fractional_sde/paper_moving_mnist", *options)
