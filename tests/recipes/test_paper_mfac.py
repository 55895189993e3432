"""M-FAC's paper recipes have the authors' settings, build on the meta device, and run up to the missing data."""

import importlib
import json
import sys
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lit_methods.datamodules import CIFAR10DataModule
from lit_methods.llm import SequenceClassification
from tests.cli import run_here
from tests.contract.pieces import ROOT

CIFAR10, CIFAR100, GLUE = "paper_cifar10_resnet20", "paper_wrn_cifar100", "paper_bert_tiny_glue"


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / "mfac" / f"{name}.yaml").read_text())


def build(spec: dict[str, Any]) -> nn.Module:
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**spec["init_args"])


@pytest.mark.parametrize(
    ("name", "m", "damping", "lr", "weight_decay", "batch_size", "epochs", "milestones"),
    [
        (CIFAR10, 512, 1e-5, 1e-3, 0.003, 128, 164, [82, 123]),
        (CIFAR100, 1024, 1e-5, 1e-3, 0.0, 128, 200, [100, 150]),
        (GLUE, 1024, 1e-6, 1e-4, 0.0, 32, 5, None),
    ],
)
def test_settings_are_the_authors(name, m, damping, lr, weight_decay, batch_size, epochs, milestones) -> None:
    config = recipe(name)
    model = config["model"]["init_args"]
    expected = {"lr": lr, "momentum": 0.0, "weight_decay": weight_decay, "num_grads": m, "damping": damping}
    assert model["optimizer"] == {"class_path": "lit_methods.optim.MFAC", "init_args": expected}
    assert config["data"]["init_args"]["batch_size"] == batch_size
    assert config["trainer"]["max_epochs"] == epochs
    if milestones is None:
        assert (model["warmup"], config["trainer"]["gradient_clip_val"]) == (0.0, 1.0)
        assert config["data"]["init_args"]["max_length"] == 128
    else:
        assert model["lr_scheduler"]["init_args"] == {"milestones": milestones, "gamma": 0.1}
        assert config["data"]["init_args"]["val_size"] == 0


def test_resnet20_has_its_published_size() -> None:
    with torch.device("meta"):
        network = build(recipe(CIFAR10)["model"]["init_args"]["network"])
    assert sum(p.numel() for p in network.parameters()) == 269_722
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_wide_resnet_has_the_size_of_its_plan() -> None:
    """WRN-22-2: a 3x3 stem, 3 stages of 3 blocks of two 3x3 convolutions, 1x1 shortcuts, normalisations, a head."""
    with torch.device("meta"):
        network = build(recipe(CIFAR100)["model"]["init_args"]["network"])
    count, channels = 9 * 3 * 16, 16
    for width in (32, 64, 128):
        for _ in range(3):
            count += 2 * channels + 9 * channels * width + 2 * width + 9 * width * width
            count += channels * width if channels != width else 0
            channels = width
    count += 2 * 128 + 128 * 100 + 100
    assert sum(p.numel() for p in network.parameters()) == count == 1_091_252
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 100)


def test_bert_tiny_has_its_published_size() -> None:
    arguments = recipe(GLUE)["model"]["init_args"]
    with torch.device("meta"):
        module = SequenceClassification(arguments["architecture"], arguments["num_labels"], arguments["metrics"])
    assert sum(p.numel() for p in module.network.bert.parameters()) == 4_385_920  # "4.4M" in arXiv 1908.08962
    assert sum(p.numel() for p in module.network.parameters()) == 4_385_920 + 2 * 128 + 2
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    assert module.network(input_ids=tokens).logits.shape == (2, 2)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        (CIFAR10, "cifar-10-binary.tar.gz, or the folder cifar-10-batches-bin"),
        (CIFAR100, "cifar-100-binary.tar.gz, or the folder cifar-100-binary"),
        (GLUE, "QQP/train.tsv"),
    ],
)
def test_runs_up_to_the_missing_data(name, files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(CIFAR10DataModule, "mirrors", ("http://127.0.0.1:9/",))  # nobody listens there
    monkeypatch.setitem(sys.modules, "datasets", None)
    options = ["--trainer.accelerator=cpu", f"--data.data_dir={tmp_path}", "--data.num_workers=0"]
    if name == GLUE:
        architecture = recipe(name)["model"]["init_args"]["architecture"]
        options += [f"--model.model={json.dumps(architecture)}", "--model.architecture=null"]
    with pytest.raises(FileNotFoundError) as error:
        run_here(monkeypatch, tmp_path, "fit", "--config", f"mfac/{name}", *options)
    assert files in str(error.value)
    assert str(tmp_path) in str(error.value)
