"""Cases of the family: fractional SDEs and the time series that they learn from."""

from functools import partial
from typing import Any

import torch
from torch import nn

from lit_methods.batches import PathBatch
from lit_methods.callbacks import PathPosterior
from lit_methods.datamodules import (
    BridgeDataModule,
    FractionalPathDataModule,
    MovingDigitsDataModule,
    StockVolatilityDataModule,
)
from lit_methods.vi import ControlMLP, FractionalSDE, FractionalSDEModule, LinearDrift, MarkovFBM, NoisePosterior
from tests.contract.cases.kinds import (
    LOADER_ARGUMENTS,
    TINY,
    CallbackCase,
    DataModuleCase,
    ModuleCase,
    RecipeCase,
    class_config,
)

_VI = "lit_methods.vi."


def _sde(control: nn.Module | None = None, **noise: Any) -> FractionalSDE:
    return FractionalSDE(LinearDrift(), 1.0, control or ControlMLP(1, 5, [8]), MarkovFBM(**noise), 1, dt=0.02)


def _batch() -> tuple[PathBatch]:
    mask = torch.tensor([[False, True, True]] * 4)
    return (PathBatch(torch.tensor([0.0, 0.5, 1.0]), torch.zeros(4, 3, 1), mask),)


_SDE = class_config(
    _VI + "FractionalSDE",
    drift=class_config(_VI + "DriftMLP", state_dim=2, hidden_dims=[8]),
    diffusion=class_config(_VI + "DiagonalDiffusion", state_dim=2, hidden_dims=[8]),
    control=class_config(_VI + "ControlMLP", state_dim=2, num_ou=3, hidden_dims=[8], context_dim=4),
    noise=class_config(_VI + "MarkovFBM", num_ou=3, gamma_max=5.0, time_horizon=2.0, kind="I", normalize=True),
    state_dim=2,
    dt=0.05,
)
_ENCODER = class_config(_VI + "SeriesEncoder", features=1, state_dim=2, context_dim=4, hidden_dim=8)
_POSTERIOR = class_config(_VI + "NoisePosterior", state_dim=2, num_ou=3, context_dim=4)
_DATA = class_config(
    "lit_methods.datamodules.FractionalPathDataModule",
    num_times=6, missing=0.2, train_size=24, val_size=8, test_size=8, batch_size=8,
)  # fmt: skip

MODULES: dict[str, ModuleCase] = {
    "lit_methods.vi.FractionalSDEModule": ModuleCase(
        config={
            "model": class_config(
                _VI + "FractionalSDEModule",
                sde=_SDE,
                encoder=_ENCODER,
                decoder=class_config("tests.unit.vi.fractional_sde.decoders.Sum"),
                y0_posterior=_POSTERIOR,
                obs_std=None,
            ),
            "data": _DATA,
        },
        make=lambda: FractionalSDEModule(_sde(), seed=0),
        forward_inputs=_batch,
        bad=[
            (partial(FractionalSDEModule, **{"sde": _sde()} | arguments), message)
            for arguments, message in [
                ({"obs_std": 0.0}, "obs_std must be > 0 and finite, or None, got 0.0"),
                ({"kl_weight": -1.0}, "kl_weight must be >= 0"),
                ({"num_paths": 1}, "num_paths must be >= 2, got 1"),
                ({"x0": float("inf")}, "x0 must be finite"),
                ({"seed": -1}, "seed must be >= 0, got -1"),
                ({"y0_posterior": NoisePosterior(1, 5)}, "y0_posterior must be None unless.*kind 'II'"),
                ({"sde": FractionalSDE(LinearDrift(), 1.0, None, MarkovFBM(), 1)}, "sde must have a control"),
            ]
        ],
        not_applicable={
            "check_compiles": "the number of steps is read from the times, which a graph cannot hold; networks compile"
        },
    ),
}

_LOADER = [*LOADER_ARGUMENTS[:3]]

DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.BridgeDataModule": DataModuleCase(
        lambda folder, **arguments: BridgeDataModule(**{"batch_size": 4, "steps_per_epoch": 3} | arguments),
        bad=[
            *_LOADER,
            ({"times": (2.0, 1.0)}, "times=\\(2.0, 1.0\\): must increase strictly"),
            ({"values": (0.0, 1.0)}, "values=\\(0.0, 1.0\\): must hold a finite number for each of 1 times"),
            ({"steps_per_epoch": 0}, "steps_per_epoch=0: must be"),
            ({"eval_size": 0}, "eval_size=0: must be"),
        ],
        not_applicable={
            "check_batches_are_a_function_of_the_seed": "all rows hold the same observations whatever the seed is",
            "check_epochs_differ": "all rows hold the same observations in every epoch",
        },
    ),
    "lit_methods.datamodules.FractionalPathDataModule": DataModuleCase(
        lambda folder, **arguments: FractionalPathDataModule(
            **{"train_size": 20, "val_size": 6, "test_size": 6, "batch_size": 4} | arguments
        ),
        bad=[
            *LOADER_ARGUMENTS,
            ({"hurst": 1.5}, r"hurst must be in \(0, 1\), got 1.5"),
            ({"kind": "III"}, "kind must be 'I'.*got 'III'"),
            ({"rate": -1.0}, "rate=-1.0: must be >= 0"),
            ({"scale": 0.0}, "scale=0.0: must be > 0"),
            ({"num_times": 0}, "num_times=0: must be"),
            ({"t_max": 0.0}, "t_max=0.0: must be > 0"),
            ({"obs_std": -1.0}, "obs_std=-1.0: must be >= 0"),
            ({"missing": 1.0}, r"missing=1.0: must be in \[0, 1\)"),
            ({"train_size": 0}, "train_size=0: must be"),
            ({"test_size": -1}, "test_size=-1: must be"),
        ],
    ),
    "lit_methods.datamodules.StockVolatilityDataModule": DataModuleCase(
        lambda folder, **arguments: StockVolatilityDataModule(**{"batch_size": 8} | arguments),
        bad=[*_LOADER, ({"window": 7}, "window=7: must be"), ({"stride": 0}, "stride=0: must be")],
    ),
    "lit_methods.datamodules.MovingDigitsDataModule": DataModuleCase(
        lambda folder, **arguments: MovingDigitsDataModule(
            **{"train_size": 20, "val_size": 6, "test_size": 6, "batch_size": 4, "num_frames": 5} | arguments
        ),
        bad=[
            *LOADER_ARGUMENTS,
            ({"size": 4}, "size=4: must be"),
            ({"digit_size": 40}, "digit_size=40: must be"),
            ({"num_digits": 0}, "num_digits=0: must be"),
            ({"num_frames": 1}, "num_frames=1: must be"),
            ({"max_speed": 0}, "max_speed=0: must be"),
            ({"dt": 0.0}, "dt=0.0: must be > 0"),
            ({"train_size": 0}, "train_size=0: must be"),
            ({"test_size": -1}, "test_size=-1: must be"),
        ],
    ),
}


CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.PathPosterior": CallbackCase(
        PathPosterior,
        bad=[
            (partial(PathPosterior, **arguments), message)
            for arguments, message in [
                ({"num_paths": 1}, "num_paths must be >= 2, got 1"),
                ({"num_prior": 0}, "num_prior must be >= 1, got 0"),
                ({"num_times": 1}, "num_times must be >= 2, got 1"),
            ]
        ],
        not_applicable={"check_state_survives_a_checkpoint": "it keeps nothing from one test to the next"},
    ),
}

_BRIDGE = [*TINY, "--data.batch_size=4", "--data.steps_per_epoch=3", "--data.eval_size=8"]
_SIZES = ["--data.train_size=24", "--data.val_size=8", "--data.test_size=8", "--data.batch_size=8"]

RECIPES: dict[str, RecipeCase] = {
    "fractional_sde/bridge": RecipeCase([*_BRIDGE, "--model.sde.dt=0.2"]),
    "fractional_sde/fou_bridge": RecipeCase([*_BRIDGE, "--model.sde.dt=0.2"]),
    "fractional_sde/learn_hurst": RecipeCase([*TINY, *_SIZES, "--data.num_times=10"]),
    "fractional_sde/rough_volatility": RecipeCase([*TINY, "--data.window=16", "--model.sde.noise.gamma_max=5"]),
    "fractional_sde/moving_digits": RecipeCase([*TINY, *_SIZES, "--data.num_frames=4"]),
}
