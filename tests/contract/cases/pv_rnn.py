"""Cases of the family: vi, PV-RNN and time series."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from lit_methods.callbacks import PriorRollouts
from lit_methods.datamodules import (
    PrimitiveSwitchDataModule,
    SinesDataModule,
    SymbolicMarkovDataModule,
    TimeSeriesDataModule,
)
from lit_methods.vi import PVRNN, PVRNNModule
from lit_methods.vi.pv_rnn import Recognition
from tests.contract.cases.kinds import (
    LOADER_ARGUMENTS,
    Arguments,
    CallbackCase,
    DataModuleCase,
    ModuleCase,
    RecipeCase,
    class_config,
)

_SMALL: dict[str, Any] = {"hidden_sizes": [5, 4], "latent_sizes": [2, 1], "time_constants": [2.0, 4.0]}
_LOADERS = [case for case in LOADER_ARGUMENTS if "val_size" not in case[0]]


def _network() -> PVRNN:
    return PVRNN(1, **_SMALL)


def _arrays(folder: Path, **arguments: Any) -> LightningDataModule:
    draws = np.random.default_rng(0).uniform(-0.8, 0.8, (40, 6, 2)).astype(np.float32)
    draws[3, 4:] = np.nan
    for name, part in (("train", draws[:24]), ("val", draws[24:32]), ("test", draws[32:])):
        np.save(folder / f"{name}.npy", part)
    files = {name: str(folder / f"{name}.npy") for name in ("train", "val", "test")}
    return TimeSeriesDataModule(**(files | {"batch_size": 4} | arguments))


_SIZES: list[tuple[Arguments, str]] = [
    *LOADER_ARGUMENTS,
    ({"train_size": 0}, "train_size=0: must be"),
    ({"test_size": -1}, "test_size=-1: must be"),
]

MODULES: dict[str, ModuleCase] = {
    "lit_methods.vi.PVRNNModule": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.vi.PVRNNModule",
                network=class_config("lit_methods.vi.PVRNN", output_size=1, **_SMALL),
                recognition={"window": 4, "iterations": 3, "horizon": 2, "num_samples": 2},
            ),
            "data": class_config(
                "lit_methods.datamodules.SymbolicMarkovDataModule",
                seq_len=6, train_size=24, val_size=4, test_size=4, batch_size=4,
            ),
        },
        make=lambda: PVRNNModule(_network(), num_sequences=6, seq_len=5),
        forward_inputs=lambda: (torch.tensor([4, 1, 1]),),
        bad=[
            (lambda: PVRNNModule(_network(), meta_prior=-1.0), "meta_prior must be >= 0"),
            (lambda: PVRNNModule(_network(), meta_prior=[0.1] * 3), "one for each of 2 layers, got 3"),
            (lambda: PVRNNModule(_network(), initial_meta_prior=-1.0), "initial_meta_prior must be >= 0"),
            (lambda: PVRNNModule(_network(), num_sequences=0), "num_sequences must be >= 1"),
            (lambda: PVRNNModule(_network(), seq_len=0), "seq_len must be >= 1"),
            (lambda: PVRNNModule(_network(), update_rows="some"), "update_rows must be"),  # type: ignore[arg-type]
            (lambda: PVRNNModule(_network(), recognition=Recognition(window=0)), "window must be >= 1"),
            (lambda: PVRNNModule(_network(), recognition=Recognition(iterations=-1)), "iterations must be >= 0"),
            (lambda: PVRNNModule(_network(), recognition=Recognition(lr=0.0)), "lr must be > 0"),
            (lambda: PVRNNModule(_network(), recognition=Recognition(restarts=0)), "restarts must be >= 1"),
            (lambda: PVRNNModule(_network(), recognition=Recognition(horizon=0)), "horizon must be >= 1"),
            (lambda: PVRNNModule(_network(), recognition=Recognition(num_samples=0)), "num_samples must be >= 1"),
            (lambda: PVRNNModule(_network(), seed=-1), "seed must be >= 0"),
        ],
        not_applicable={
            "check_compiles": "The loop over time has a backward pass of its own, which torch.compile leaves as it is."
        },
    ),
}  # fmt: skip

DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.TimeSeriesDataModule": DataModuleCase(_arrays, bad=_LOADERS),
    "lit_methods.datamodules.SymbolicMarkovDataModule": DataModuleCase(
        lambda folder, **arguments: SymbolicMarkovDataModule(
            **({"train_size": 32, "val_size": 4, "test_size": 4, "batch_size": 4} | arguments)
        ),
        bad=[
            *_SIZES,
            ({"seq_len": 0}, "seq_len=0: must be"),
            ({"machine": [[(0.5, 0, 0)]]}, "machine must give state 0 probabilities that sum to 1"),
            ({"machine": [[(1.0, 2, 0)]]}, "machine must name symbols in"),
        ],
    ),
    "lit_methods.datamodules.PrimitiveSwitchDataModule": DataModuleCase(
        lambda folder, **arguments: PrimitiveSwitchDataModule(**({"batch_size": 4} | arguments)),
        bad=[
            *_SIZES,
            ({"frequencies": [(1, 2)]}, "frequencies must hold 2 or more pairs"),
            ({"frequencies": [(1, 2), (0, 1)]}, "frequencies must hold"),
            ({"stay": 1.5}, "stay must be in"),
            ({"noise": -0.1}, "noise must be >= 0"),
            ({"period": 3}, "period=3: must be"),
            ({"repeats": 0}, "repeats=0: must be"),
        ],
    ),
}

DATAMODULES["lit_methods.datamodules.SinesDataModule"] = DataModuleCase(
    lambda folder, **arguments: SinesDataModule(**({"train_size": 24, "val_size": 4, "batch_size": 4} | arguments)),
    bad=[
        *_SIZES,
        ({"seq_len": 0}, "seq_len=0: must be"),
        ({"period": 1}, "period=1: must be"),
        ({"amplitude": 0.0}, "amplitude must be > 0"),
    ],
)

CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.PriorRollouts": CallbackCase(
        make=PriorRollouts,
        bad=[
            (lambda: PriorRollouts(num_rollouts=0), "num_rollouts must be >= 1"),
            (lambda: PriorRollouts(period=0), "period must be >= 1"),
            (lambda: PriorRollouts(burn_in=-1), "burn_in must be >= 0"),
            (lambda: PriorRollouts(every_n_epochs=0), "every_n_epochs must be >= 1"),
        ],
        not_applicable={
            name: "It refuses a module without a PV-RNN; tests/unit/vi/pv_rnn does it with one."
            for name in (
                "check_attaches_to_an_unrelated_module",
                "check_works_beside_averages_of_weights",
                "check_state_survives_a_checkpoint",
            )
        },
    ),
}

_TINY = ["--trainer.max_epochs=2"]

RECIPES: dict[str, RecipeCase] = {
    "pv_rnn/meta_prior": RecipeCase(_TINY, callbacks={"PriorRollouts": {"num_rollouts": 5, "every_n_epochs": 1}}),
    "pv_rnn/error_regression": RecipeCase([*_TINY, "--trainer.check_val_every_n_epoch=1"]),
    "pv_rnn/primitives": RecipeCase([*_TINY, "--trainer.check_val_every_n_epoch=1"]),
}
