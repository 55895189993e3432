"""One case per public piece: how to build it, what it must refuse, and why a check does not apply."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lit_methods.batches import SupervisedBatch
from lit_methods.callbacks import ExactResume, LearningCurves, ResultTable
from lit_methods.datamodules import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    GLUEDataModule,
    MNISTDataModule,
    TensorDataModule,
)
from lit_methods.llm import SequenceClassification
from lit_methods.nets import MLP
from lit_methods.optim import MFAC
from lit_methods.supervised import SupervisedModule
from tests.cifar_files import write_cifar
from tests.glue_files import write_glue
from tests.idx_files import write_mnist

Arguments = dict[str, Any]


@dataclass(frozen=True)
class OptimizerCase:
    """``arguments`` must suit small problems; ``bad`` pairs one wrong argument with a pattern of the error."""

    optimizer: type[Optimizer]
    arguments: Arguments
    bad: list[tuple[Arguments, str]]
    closure_calls: int = 1
    not_applicable: dict[str, str] = field(default_factory=dict)

    def make(self, params: Any, **overrides: Any) -> Optimizer:
        """Build the optimizer."""
        return self.optimizer(params, **(self.arguments | overrides))


@dataclass(frozen=True)
class ModuleCase:
    """``config`` is a CLI config of module and datamodule; ``make`` builds the module directly, without the CLI.

    ``prepare`` fills the working folder of a run with the data that ``config`` reads.
    """

    config: dict[str, Any]
    make: Callable[[], LightningModule]
    forward_inputs: Callable[[], tuple[Tensor, ...]]
    bad: list[tuple[Callable[[], object], str]]
    not_applicable: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Path], None] = lambda folder: None


@dataclass(frozen=True)
class DataModuleCase:
    """``make`` gets an empty folder, fills it with what the datamodule reads, and passes keyword arguments on."""

    make: Callable[..., LightningDataModule]
    bad: list[tuple[Arguments, str]]
    not_applicable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CallbackCase:
    """``make`` builds the callback for a two-epoch fit of an unrelated module."""

    make: Callable[[], Callback]
    bad: list[tuple[Callable[[], object], str]]
    not_applicable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RecipeCase:
    """``overrides`` make a tiny run of a small or slow recipe; ``prepare`` fills a folder with its data first."""

    overrides: list[str]
    prepare: Callable[[Path], None] = lambda folder: None


def _module(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


OPTIMIZERS: dict[str, OptimizerCase] = {
    "lit_methods.optim.MFAC": OptimizerCase(
        MFAC,
        {"lr": 0.05, "num_grads": 8, "damping": 1e-2, "momentum": 0.5, "weight_decay": 1e-3},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"momentum": 1.0}, "momentum must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
            ({"num_grads": 0}, "num_grads must be"),
            ({"damping": 0.0}, "damping must be"),
            ({"history_dtype": "int8"}, "history_dtype must be"),
            ({"window_scale": "half"}, "window_scale must be"),
            ({"solver": "lu"}, "solver must be"),
        ],
    ),
}

_TINY_BERT = {
    "model_type": "bert",
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}

MODULES: dict[str, ModuleCase] = {
    "lit_methods.llm.SequenceClassification": ModuleCase(
        config={
            "model": _module(
                "lit_methods.llm.SequenceClassification",
                model=_TINY_BERT,
                metrics=["accuracy", "f1", "matthews"],
                warmup=0.1,
                optimizer=_module("lit_methods.optim.MFAC", lr=1e-2, num_grads=4, damping=1e-3),
            ),
            "data": _module(
                "lit_methods.datamodules.GLUEDataModule", task="rte", tokenizer="tokenizer", data_dir=".", batch_size=4
            ),
        },
        make=lambda: SequenceClassification(_TINY_BERT),
        forward_inputs=lambda: (torch.arange(8).view(2, 4), torch.ones(2, 4).long(), torch.zeros(2, 4).long()),
        bad=[
            (lambda: SequenceClassification(_TINY_BERT, num_labels=1), "num_labels must be"),
            (lambda: SequenceClassification(_TINY_BERT, warmup=1.0), "warmup must be"),
            (lambda: SequenceClassification(_TINY_BERT, metrics=["pearson"]), "metrics must name"),
            (lambda: SequenceClassification({"hidden_size": 8}), "model has no model_type"),
        ],
        prepare=write_glue,
    ),
    "lit_methods.supervised.SupervisedModule": ModuleCase(
        config={
            "model": _module(
                "lit_methods.supervised.SupervisedModule",
                network=_module("lit_methods.nets.MLP", in_features=64, hidden_features=[16], out_features=10),
                num_classes=10,
                optimizer=_module("lit_methods.optim.MFAC", lr=1e-2, num_grads=4, damping=1e-3, momentum=0.9),
                lr_scheduler=_module("torch.optim.lr_scheduler.StepLR", step_size=1),
            ),
            "data": _module("lit_methods.datamodules.DigitsDataModule", batch_size=32),
        },
        make=lambda: SupervisedModule(MLP(64, [16], 10), num_classes=10),
        forward_inputs=lambda: (torch.ones(2, 1, 8, 8),),
        bad=[(lambda: SupervisedModule(MLP(4, [], 1), num_classes=1), "num_classes must be")],
    ),
}

CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.ExactResume": CallbackCase(ExactResume, bad=[]),
    "lit_methods.callbacks.LearningCurves": CallbackCase(
        LearningCurves,
        bad=[
            (lambda: LearningCurves(metrics=[]), "metrics must name"),
            (lambda: LearningCurves(name="a/b"), "name must be"),
        ],
    ),
    "lit_methods.callbacks.ResultTable": CallbackCase(
        ResultTable,
        bad=[(lambda: ResultTable(stage="fit"), "stage must be")],
        not_applicable={
            "check_state_survives_a_checkpoint": "It keeps nothing between steps: its results come after fit has ended."
        },
    ),
}

_LOADER_ARGUMENTS: list[tuple[Arguments, str]] = [
    ({"batch_size": 0}, "batch_size=0: must be an integer >= 1"),
    ({"num_workers": -1}, "num_workers=-1: must be"),
    ({"seed": -1}, "seed=-1: must be"),
    ({"val_size": -1}, "val_size=-1: must be"),
]


def _mnist(datamodule: type[LightningDataModule], folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_mnist(folder)
    return datamodule(**({"data_dir": str(folder), "batch_size": 4, "val_size": 8} | arguments))


def _cifar(datamodule: type[CIFAR10DataModule], folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_cifar(folder, datamodule)
    return datamodule(**({"data_dir": str(folder), "batch_size": 4, "val_size": 8} | arguments))


def _glue(folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_glue(folder)
    tokenizer = str(folder / "tokenizer")
    return GLUEDataModule(
        **({"task": "rte", "tokenizer": tokenizer, "data_dir": str(folder), "batch_size": 4} | arguments)
    )


_CIFAR_ARGUMENTS: list[tuple[Arguments, str]] = [
    *_LOADER_ARGUMENTS,
    ({"mean": (0.5,)}, "mean=.*three numbers"),
    ({"std": (1.0, 0.0, 1.0)}, "std=.*three numbers > 0"),
]


def _tensors(folder: Path, **arguments: Any) -> LightningDataModule:
    rows = SupervisedBatch(torch.arange(40.0)[:, None], torch.arange(40) % 3)
    return TensorDataModule(train=rows, val=rows, test=rows, **({"batch_size": 4} | arguments))


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.CIFAR10DataModule": DataModuleCase(
        partial(_cifar, CIFAR10DataModule), bad=_CIFAR_ARGUMENTS
    ),
    "lit_methods.datamodules.CIFAR100DataModule": DataModuleCase(
        partial(_cifar, CIFAR100DataModule), bad=[*_CIFAR_ARGUMENTS, ({"label": "medium"}, "label='medium'")]
    ),
    "lit_methods.datamodules.TensorDataModule": DataModuleCase(_tensors, bad=_LOADER_ARGUMENTS[:3]),
    "lit_methods.datamodules.DigitsDataModule": DataModuleCase(
        lambda folder, **arguments: DigitsDataModule(**arguments),
        bad=[*_LOADER_ARGUMENTS, ({"test_size": 1797}, "test_size=1797: must be")],
    ),
    "lit_methods.datamodules.FashionMNISTDataModule": DataModuleCase(
        partial(_mnist, FashionMNISTDataModule), bad=_LOADER_ARGUMENTS
    ),
    "lit_methods.datamodules.GLUEDataModule": DataModuleCase(
        _glue,
        bad=[
            *_LOADER_ARGUMENTS[:3],
            ({"task": "squad"}, "task='squad': must be one of cola"),
            ({"max_length": 0}, "max_length=0: must be"),
        ],
    ),
    "lit_methods.datamodules.MNISTDataModule": DataModuleCase(partial(_mnist, MNISTDataModule), bad=_LOADER_ARGUMENTS),
}

_TINY = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2"]

RECIPES: dict[str, RecipeCase] = {
    "mfac/digits": RecipeCase(_TINY),
    "mfac/fashion_mnist": RecipeCase(
        [*_TINY, "--data.data_dir=.", "--data.val_size=8", "--data.batch_size=8"], prepare=write_mnist
    ),
}
