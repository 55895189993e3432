"""Cases of programmable variational inference."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_methods.batches import ObservationBatch
from lit_methods.callbacks import CountAccuracy, PosteriorDiagnostics
from lit_methods.datamodules import (
    DiabetesDataModule,
    DigitScenesDataModule,
    MultiMNISTDataModule,
    RepeatedObservationDataModule,
)
from lit_methods.vi import ProgrammableVI
from lit_methods.vi.programmable.examples import BetaGuide, CoinModel
from tests.contract.cases.kinds import (
    LOADER_ARGUMENTS,
    CallbackCase,
    DataModuleCase,
    ModuleCase,
    RecipeCase,
    class_config,
)
from tests.standins.idx_files import write_mnist

_EXAMPLES = "lit_methods.vi.programmable.examples"
_FLIPS = [1.0, 1.0, 0.0]


def _module(**arguments: object) -> ProgrammableVI:
    return ProgrammableVI(CoinModel(), BetaGuide(), **arguments)  # type: ignore[arg-type]


def _shared() -> ProgrammableVI:
    guide = BetaGuide()
    return ProgrammableVI(nn.Sequential(guide), guide, model_objective="wake_p")


MODULES: dict[str, ModuleCase] = {
    "lit_methods.vi.ProgrammableVI": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.vi.ProgrammableVI",
                model=class_config(f"{_EXAMPLES}.CoinModel"),
                guide=class_config(f"{_EXAMPLES}.BetaGuide"),
                objective="iwelbo",
                num_samples=2,
            ),
            "data": class_config(
                "lit_methods.datamodules.RepeatedObservationDataModule", values=_FLIPS, repeats=24, batch_size=4
            ),
        },
        make=_module,
        forward_inputs=lambda: (ObservationBatch(torch.tensor([_FLIPS])),),
        bad=[
            (lambda: _module(num_samples=0), "num_samples must be >= 1, got 0"),
            (lambda: _module(num_particles=0), "num_particles must be >= 1, got 0"),
            (lambda: _module(num_particles=2), "num_particles must be None unless objective takes it"),
            (lambda: _module(eval_samples=0), "eval_samples must be >= 1, got 0"),
            (lambda: _module(batch_dims=-1), "batch_dims must be >= 0, got -1"),
            (lambda: _module(chunk_size=0), "chunk_size must be >= 1, got 0"),
            (lambda: _module(max_branches=0), "max_branches must be >= 1, got 0"),
            (lambda: _module(baseline_lr=0.0), "baseline_lr must be > 0"),
            (lambda: _module(objective="elbow"), "objective must be one of"),
            (lambda: _module(objective=lambda p, q: None), "objective must make an Objective"),
            (lambda: _module(settings={"alpha": 0.5}), "settings must be None unless objective takes it"),
            (lambda: _module(objective="wake_q", model_objective="wake"), "model_objective must be one of"),
            (lambda: _module(model_objective="wake_p", chunk_size=1), "chunk_size must be None with model_objective"),
            (lambda: _module(baseline_lr=0.1).configure_optimizers(), "baseline_lr must be None without parameters"),
            (_shared, "model_objective must be None for a model and a guide that share parameters"),
        ],
        not_applicable={"check_compiles": "Its forward draws random numbers; tests/unit/vi compiles estimates."},
    ),
}


def _multi_mnist(folder: Path, **arguments: Any) -> MultiMNISTDataModule:
    if not any(folder.iterdir()):
        write_mnist(folder)
    few = {"train_size": 12, "val_size": 4, "test_size": 4, "batch_size": 4}
    return MultiMNISTDataModule(**({"data_dir": str(folder), **few} | arguments))


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.DiabetesDataModule": DataModuleCase(
        lambda folder, **arguments: DiabetesDataModule(**({"batch_size": 32} | arguments)),
        bad=[*LOADER_ARGUMENTS, ({"test_size": 440}, "test_size=440: must be")],
    ),
    "lit_methods.datamodules.DigitScenesDataModule": DataModuleCase(
        lambda folder, **arguments: DigitScenesDataModule(
            **({"train_size": 12, "val_size": 4, "test_size": 4, "batch_size": 4} | arguments)
        ),
        bad=[
            *LOADER_ARGUMENTS,
            ({"size": 15}, "size=15: must be"),
            ({"max_digits": 0}, "max_digits=0: must be"),
            ({"train_size": 0}, "train_size=0: must be"),
            ({"test_size": -1}, "test_size=-1: must be"),
        ],
    ),
    "lit_methods.datamodules.MultiMNISTDataModule": DataModuleCase(
        _multi_mnist,
        bad=[
            *LOADER_ARGUMENTS,
            ({"size": 49}, "size=49: must be"),
            ({"max_digits": 0}, "max_digits=0: must be"),
            ({"train_size": 0}, "train_size=0: must be"),
            ({"test_size": -1}, "test_size=-1: must be"),
        ],
    ),
    "lit_methods.datamodules.RepeatedObservationDataModule": DataModuleCase(
        lambda folder, **arguments: RepeatedObservationDataModule(
            **({"values": _FLIPS, "repeats": 12, "batch_size": 4} | arguments)
        ),
        bad=[
            *LOADER_ARGUMENTS[:3],
            ({"values": []}, "values="),
            ({"values": [float("nan")]}, "values="),
            ({"repeats": 0}, "repeats=0: must be"),
        ],
        not_applicable={
            "check_batches_are_a_function_of_the_seed": "All of its rows are the same, whatever the seed.",
            "check_epochs_differ": "All of its rows are the same, in every epoch.",
        },
    ),
}

CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.CountAccuracy": CallbackCase(
        lambda: CountAccuracy(["z"]),
        bad=[(lambda: CountAccuracy([]), "sites must name at least one site")],
        not_applicable={
            "check_attaches_to_an_unrelated_module": "It refuses modules that are not a ProgrammableVI by name.",
            "check_state_survives_a_checkpoint": "It keeps nothing between batches.",
        },
    ),
    "lit_methods.callbacks.PosteriorDiagnostics": CallbackCase(
        PosteriorDiagnostics,
        bad=[
            (lambda: PosteriorDiagnostics(num_particles=24), "num_particles must be >= 25, got 24"),
            (lambda: PosteriorDiagnostics(num_batches=0), "num_batches must be"),
            (lambda: PosteriorDiagnostics(num_predictive=0), "num_predictive must be"),
            (lambda: PosteriorDiagnostics(every_n_epochs=0), "every_n_epochs must be"),
            (lambda: PosteriorDiagnostics(image_shape=(8, 0)), "image_shape must be"),
            (lambda: PosteriorDiagnostics(name="a/b"), "name must be"),
        ],
        not_applicable={
            "check_attaches_to_an_unrelated_module": "It refuses modules that are not a ProgrammableVI by name.",
            "check_state_survives_a_checkpoint": "It refuses the unrelated module; tests/unit/callbacks/vi does it.",
        },
    ),
}

_FEW = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2"]
_QUICK = ["--model.num_samples=2", "--model.eval_samples=4"]

RECIPES: dict[str, RecipeCase] = {
    "programmable_vi/coin": RecipeCase([*_FEW, *_QUICK], callbacks={"PosteriorDiagnostics": {"num_particles": 25}}),
    "programmable_vi/cone": RecipeCase([*_FEW, *_QUICK]),
    "programmable_vi/regression": RecipeCase([*_FEW, *_QUICK]),
    "programmable_vi/vae_digits": RecipeCase(
        [*_FEW, *_QUICK], callbacks={"PosteriorDiagnostics": {"num_particles": 25, "every_n_epochs": 1}}
    ),
    "programmable_vi/air_digits": RecipeCase(
        [*_FEW, "--data.train_size=200", "--data.val_size=64", "--data.test_size=64"]
    ),
}
