"""The paper recipes of f-distill have the published settings, and all of their networks build on the meta device."""

from typing import Any

import jsonargparse
import pytest
import torch
import yaml

from lit_methods import diffusion
from lit_methods.diffusion import Denoiser, FDistill, FeatureDiscriminator
from tests.contract.pieces import ROOT

pytest.importorskip("diffusers")

SETTINGS = {  # divergence, lr, gan_weight, student_every, global batch, iterations, guidance, ema of ratios
    "paper_cifar10": ("kl", 1e-4, 1e-3, 5, 2048, 100_000, None, 0.0),
    "paper_imagenet64": ("js", 2e-6, 3e-3, 5, 512, 600_000, None, 0.5),
    "paper_sd15": ("js", 1e-5, 1e-3, 10, 2048, 100_000, 1.75, 0.0),
}


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / "f_distill" / f"{name}.yaml").read_text())


def built(config: dict[str, Any]) -> Any:
    return getattr(diffusion, config["class_path"].rpartition(".")[2])(**config["init_args"])


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_the_published_ones(name: str) -> None:
    config = recipe(name)
    model, trainer, data = config["model"]["init_args"], config["trainer"], config["data"]["init_args"]
    batch = data["batch_size"] * trainer["devices"] * trainer["num_nodes"]
    batches = trainer.get("limit_train_batches", 50_000 // 2048)
    assert (
        model["divergence"],
        model["optimizer"]["init_args"]["lr"],
        model["gan_weight"],
        model["student_every"],
        batch,
        round(trainer["max_epochs"] * batches, -4),
        model["guidance_scale"],
        model["ratio"]["ema"],
    ) == SETTINGS[name]
    assert model["optimizer"]["init_args"] | {"lr": 0} == {
        "lr": 0, "betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-8,
    }  # fmt: skip
    assert model["grad_clip"] == 10
    assert trainer["callbacks"][0]["init_args"] == {"target": "student", "decays": [0.9999, 0.99995, 0.9996]}


@pytest.mark.parametrize("name", SETTINGS)
def test_everything_builds_on_the_meta_device(name: str) -> None:
    arguments = recipe(name)["model"]["init_args"]
    teacher = arguments.pop("teacher")["init_args"]["denoiser"]["init_args"]  # before weights are loaded
    net, process, conditioning = (teacher.pop(part) for part in ("net", "process", "conditioning"))
    conditioning["init_args"].pop("null_file", None)
    with torch.device("meta"):
        network = built(net)
    denoiser = Denoiser(network, built(process), conditioning=built(conditioning), **teacher)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FDistill, "model", skip={"teacher"}, instantiate=False)
    module = FDistill(denoiser, **vars(parser.instantiate(parser.parse_object({"model": arguments})).model)).to("meta")
    shape = {"paper_cifar10": [3, 32, 32], "paper_imagenet64": [3, 64, 64], "paper_sd15": [4, 64, 64]}[name]
    x, cond = torch.empty(2, *shape, device="meta"), denoiser.conditioning.nulls(2).to("meta")
    x0, found = module.teacher.with_features(x, torch.ones(2, device="meta"), module.discriminator.layers, cond)
    logits = module.discriminator(found)
    assert x0.shape == x.shape
    assert isinstance(module.student, Denoiser)
    assert isinstance(module.discriminator, FeatureDiscriminator)
    features = {
        "paper_cifar10": [(256, 32, 32), (256, 16, 16), (256, 8, 8)],
        "paper_imagenet64": [(768, 8, 8)],
        "paper_sd15": [(1280, 8, 8)],
    }
    assert [tuple(x.shape[1:]) for x in found] == features[name]
    assert logits.shape == (2, len(found))
    millions = sum(p.numel() for p in module.student.parameters()) / 1e6
    low, high = {"paper_cifar10": (45, 70), "paper_imagenet64": (250, 330), "paper_sd15": (855, 865)}[name]
    assert low < millions < high
