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
from lit_methods.callbacks import ConvergenceRates, ExactResume, FactorRebalancing, LearningCurves, ResultTable
from lit_methods.datamodules import (
    DigitsDataModule,
    FashionMNISTDataModule,
    MNISTDataModule,
    SensingDataModule,
    TensorDataModule,
)
from lit_methods.nets import MLP
from lit_methods.optim import MFAC
from lit_methods.sensing import AsymmetricSensing, SymmetricSensing
from lit_methods.supervised import SupervisedModule
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
    "lit_methods.sensing.SymmetricSensing": ModuleCase(
        config={
            "model": _module("lit_methods.sensing.SymmetricSensing", size=6, factor_rank=3, init_scales=[0.5, 0.2]),
            "data": _module(
                "lit_methods.datamodules.SensingDataModule", rows=6, rank=2, num_measurements=40, batch_size=8
            ),
        },
        make=lambda: SymmetricSensing(6, 3),
        forward_inputs=lambda: (),
        bad=[
            (lambda: SymmetricSensing(0, 3), "size must be"),
            (lambda: SymmetricSensing(6, 0), "factor_rank must be"),
            (lambda: SymmetricSensing(6, 3, ()), "init_scales must hold"),
            (lambda: SymmetricSensing(6, 3, (0.0,)), "init_scales must hold"),
        ],
    ),
    "lit_methods.sensing.AsymmetricSensing": ModuleCase(
        config={
            "model": _module(
                "lit_methods.sensing.AsymmetricSensing", rows=6, columns=4, factor_rank=3, init_scales=[0.5, 0.2]
            ),
            "data": _module(
                "lit_methods.datamodules.SensingDataModule",
                rows=6,
                columns=4,
                rank=2,
                symmetric=False,
                measurements="entries",
                num_measurements=20,
                steps_per_epoch=5,
            ),
        },
        make=lambda: AsymmetricSensing(6, 4, 3),
        forward_inputs=lambda: (),
        bad=[
            (lambda: AsymmetricSensing(0, 4, 3), "rows must be"),
            (lambda: AsymmetricSensing(6, 0, 3), "columns must be"),
            (lambda: AsymmetricSensing(6, 4, 0), "factor_rank must be"),
            (lambda: AsymmetricSensing(6, 4, 3, (-1.0,)), "init_scales must hold"),
            (lambda: AsymmetricSensing(6, 4, 3, imbalance=0.0), "imbalance must be"),
        ],
    ),
}

CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.ConvergenceRates": CallbackCase(
        lambda: ConvergenceRates(["loss", "val_loss"]),
        bad=[
            (lambda: ConvergenceRates([]), "metrics must name"),
            (lambda: ConvergenceRates(["loss"], from_step=0), "from_step must be"),
            (lambda: ConvergenceRates(["loss"], floor=0.0), "floor must be"),
        ],
    ),
    "lit_methods.callbacks.FactorRebalancing": CallbackCase(
        lambda: FactorRebalancing("layer.weight", "layer.weight", at_step=2),
        bad=[
            (lambda: FactorRebalancing(at_step=0), "at_step must be"),
            (lambda: FactorRebalancing(loss_fraction=1.0), "loss_fraction must be"),
            (lambda: FactorRebalancing(beta=0.0), "beta must be"),
            (lambda: FactorRebalancing(rank=0), "rank must be"),
        ],
    ),
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


def _tensors(folder: Path, **arguments: Any) -> LightningDataModule:
    rows = SupervisedBatch(torch.arange(40.0)[:, None], torch.arange(40) % 3)
    return TensorDataModule(train=rows, val=rows, test=rows, **({"batch_size": 4} | arguments))


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.TensorDataModule": DataModuleCase(_tensors, bad=_LOADER_ARGUMENTS[:3]),
    "lit_methods.datamodules.DigitsDataModule": DataModuleCase(
        lambda folder, **arguments: DigitsDataModule(**arguments),
        bad=[*_LOADER_ARGUMENTS, ({"test_size": 1797}, "test_size=1797: must be")],
    ),
    "lit_methods.datamodules.FashionMNISTDataModule": DataModuleCase(
        partial(_mnist, FashionMNISTDataModule), bad=_LOADER_ARGUMENTS
    ),
    "lit_methods.datamodules.SensingDataModule": DataModuleCase(
        lambda folder, **arguments: SensingDataModule(
            **({"rows": 5, "rank": 2, "num_measurements": 20, "batch_size": 4} | arguments)
        ),
        bad=[
            *_LOADER_ARGUMENTS[:3],
            ({"rows": 0}, "rows=0: must be"),
            ({"rank": 6}, "rank=6: must be"),
            ({"num_measurements": 0}, "num_measurements=0: must be"),
            ({"steps_per_epoch": 0}, "steps_per_epoch=0: must be"),
            ({"condition_number": 0.5}, "condition_number=0.5: must be"),
            ({"noise_std": -1.0}, "noise_std=-1.0: must be"),
            ({"measurements": "fourier"}, "measurements='fourier': must be"),
            ({"dtype": "int8"}, "dtype='int8': must be"),
        ],
    ),
    "lit_methods.datamodules.MNISTDataModule": DataModuleCase(partial(_mnist, MNISTDataModule), bad=_LOADER_ARGUMENTS),
}

_TINY = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2"]

_TINY_SENSING = ["--trainer.max_epochs=1", "--trainer.val_check_interval=4", "--data.steps_per_epoch=8"]

RECIPES: dict[str, RecipeCase] = {
    "matrix_sensing/asymmetric": RecipeCase(_TINY_SENSING),
    "matrix_sensing/gaussian_one_step": RecipeCase([*_TINY_SENSING, "--data.num_measurements=50"]),
    "matrix_sensing/one_step": RecipeCase(_TINY_SENSING),
    "matrix_sensing/symmetric": RecipeCase(_TINY_SENSING),
    "matrix_sensing/symmetric_exact": RecipeCase(_TINY_SENSING),
    "mfac/digits": RecipeCase(_TINY),
    "mfac/fashion_mnist": RecipeCase(
        [*_TINY, "--data.data_dir=.", "--data.val_size=8", "--data.batch_size=8"], prepare=write_mnist
    ),
}
