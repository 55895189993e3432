"""The paper recipes have the authors' settings, build on the meta device, and run up to the missing data."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_methods.vi.programmable import elbo
from lit_methods.vi.programmable.examples import SceneGuide, SceneModel, VAEGuide, VAEModel
from tests.cli import run_here
from tests.contract.pieces import ROOT


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / "programmable_vi" / f"paper_{name}.yaml").read_text())


def test_air_settings_are_the_authors() -> None:
    config = recipe("air_multi_mnist")
    module = config["model"]["init_args"]
    model, guide = SceneModel(**module["model"]["init_args"]), SceneGuide(**module["guide"]["init_args"])
    assert model.presence == pytest.approx([0.05, 0.05**2.3, 0.05**5], rel=1e-5)
    assert model.noise == 0.3
    assert torch.equal(model.where_loc, torch.tensor([3.0, 0.0, 0.0]))
    assert torch.equal(model.where_std, torch.tensor([0.2, 1.0, 1.0]))
    assert [layer.weight.shape for layer in model.decoder if hasattr(layer, "weight")] == [(200, 50), (400, 200)]
    assert (model.decoder[-1].bias == -2).all()
    assert (guide.rnn.input_size, guide.rnn.hidden_size) == (2554, 256)
    assert guide.predict.weight.shape == (7, 256)
    assert [layer.weight.shape for layer in guide.encoder if hasattr(layer, "weight")] == [(200, 400), (100, 200)]
    assert guide.grads == ["mvd", "mvd", "enum"]
    assert module["optimizer"]["init_args"]["lr"] == 1e-4
    assert config["data"]["init_args"]["batch_size"] == 64
    assert config["trainer"]["max_epochs"] == 40


def test_vae_settings_are_the_authors() -> None:
    module = recipe("vae_mnist")["model"]["init_args"]
    model, guide = VAEModel(**module["model"]["init_args"]), VAEGuide(**module["guide"]["init_args"])
    assert [layer.weight.shape for layer in guide.encoder if hasattr(layer, "weight")] == [(200, 784), (20, 200)]
    assert [layer.weight.shape for layer in model.decoder if hasattr(layer, "weight")] == [(200, 10), (784, 200)]


def test_air_takes_a_step_at_full_size() -> None:
    config = recipe("air_multi_mnist")["model"]["init_args"]
    model, guide = SceneModel(**config["model"]["init_args"]), SceneGuide(**config["guide"]["init_args"])
    batch = type("Batch", (), {"x": torch.rand(2, 1, 50, 50)})
    estimate = elbo(model, guide)(batch, batch_shape=(2,))
    assert estimate.value.shape == (2,)
    estimate.surrogate.mean().backward()
    assert all(p.grad is not None for p in guide.parameters())


@pytest.mark.parametrize("name", ["air_multi_mnist", "vae_mnist"])
def test_runs_up_to_the_missing_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_methods.datamodules.download.urlopen", _no_network)
    with pytest.raises(FileNotFoundError, match="lacks"):
        run_here(monkeypatch, tmp_path, "fit", "--config", f"programmable_vi/paper_{name}", "--trainer.max_steps=1")


def _no_network(*args: Any, **kwargs: Any) -> None:
    raise OSError("no network")
