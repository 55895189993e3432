"""One case per public piece: how to build it, what it must refuse, and why a check does not apply."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lit_methods.callbacks import LearningCurves, ResultTable
from lit_methods.nets import MLP
from lit_methods.optim import MFAC
from lit_methods.supervised import SupervisedModule

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
    """``config`` is a CLI config of module and datamodule; ``make`` builds the module directly, without the CLI."""

    config: dict[str, Any]
    make: Callable[[], LightningModule]
    forward_inputs: Callable[[], tuple[Tensor, ...]]
    bad: list[tuple[Callable[[], object], str]]
    not_applicable: dict[str, str] = field(default_factory=dict)


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
        {"lr": 0.02, "num_grads": 8, "damping": 1e-2, "momentum": 0.5, "weight_decay": 1e-3},
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

MODULES: dict[str, ModuleCase] = {
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

DATAMODULES: dict[str, DataModuleCase] = {}

RECIPES: dict[str, RecipeCase] = {}
