"""The paper recipes of the diffusion core have the published settings, and their networks build on the meta device."""

from typing import Any

import pytest
import torch
import yaml

from lit_methods.diffusion import UNet2D
from tests.contract.pieces import ROOT

pytest.importorskip("diffusers")


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / "diffusion_principles" / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("name", "global_batch", "lr", "dropout", "decay"),
    [("paper_cifar10_edm", 512, 1e-3, 0.13, 0.9995), ("paper_cifar10_meanflow", 1024, 6e-4, 0.2, 0.9999)],
)
def test_settings_are_the_published_ones(name: str, global_batch: int, lr: float, dropout: float, decay: float) -> None:
    config = recipe(name)
    model = config["model"]["init_args"]
    assert config["data"]["init_args"]["batch_size"] * config["trainer"]["devices"] == global_batch
    assert model["optimizer"]["init_args"]["lr"] == lr
    assert model["net"]["init_args"]["model"]["dropout"] == dropout
    assert config["trainer"]["callbacks"][0]["init_args"]["decays"] == [decay]


@pytest.mark.parametrize("name", ["paper_cifar10_edm", "paper_cifar10_meanflow"])
def test_networks_build(name: str) -> None:
    with torch.device("meta"):
        net = UNet2D(**recipe(name)["model"]["init_args"]["net"]["init_args"])
        x, t = torch.empty(2, 3, 32, 32), torch.empty(2)
        more = {"s": t} if "meanflow" in name else {}
        assert net(x, t, **more).shape == x.shape
    assert 40e6 < sum(p.numel() for p in net.parameters()) < 80e6
