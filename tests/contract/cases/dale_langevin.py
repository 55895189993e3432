"""Cases of the family: dale_langevin."""

import json
from typing import Any

import torch

from lit_methods.callbacks import DaleMonitor
from lit_methods.datamodules import SparseTeacherDataModule
from lit_methods.diffusion import (
    GeometricBrownian,
    MultiplicativeDiffusion,
    PositiveData,
    PowerTimes,
    Sampling,
    TimeMLP,
)
from lit_methods.optim import AdamWExponentiated, ExponentiatedGradient, SignConstrainedSGD
from tests.contract.cases.kinds import (
    ADAM,
    LOADER_ARGUMENTS,
    TINY,
    CallbackCase,
    DataModuleCase,
    ModuleCase,
    OptimizerCase,
    RecipeCase,
    class_config,
)
from tests.standins.idx_files import write_mnist

_MOMENTUM = {"momentum": 0.5, "weight_decay": 1e-3}
_BAD_MOMENTUM = [
    ({"lr": -1.0}, "lr must be"),
    ({"momentum": -0.1}, "momentum must be"),
    ({"dampening": float("nan")}, "dampening must be"),
    ({"nesterov": True}, "nesterov must be"),
    ({"weight_decay": -0.1}, "weight_decay must be"),
]
_BAD_EXPONENTIATED = [
    ({"max_log_step": 0.0}, "max_log_step must be"),
    ({"hypentropy": -1.0}, "hypentropy must be"),
    ({"algorithm": "sgd"}, "algorithm must be"),
    ({"on_zero": "stop"}, "on_zero must be"),
    ({"on_zero": "raise"}, "holds 2 zeros"),
]

_NET = class_config("lit_methods.diffusion.TimeMLP", shape=[1, 8, 8], width=16, num_classes=10)

_TINY_UNET = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [32],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}


def _model(**arguments: Any) -> MultiplicativeDiffusion:
    return MultiplicativeDiffusion(TimeMLP([2], width=8), shape=[2], **arguments)


MODULES: dict[str, ModuleCase] = {
    "lit_methods.diffusion.MultiplicativeDiffusion": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.diffusion.MultiplicativeDiffusion",
                net=_NET,
                shape=[1, 8, 8],
                process={"mu": 0.1, "volatility": [0.7]},
                data={"prior": "channel", "max_batches": 2},
                prediction="hyvarinen",
                weighting=class_config("lit_methods.diffusion.NoiseVariance"),
                time_sampler=class_config("lit_methods.diffusion.PowerTimes", power=2.0),
                conditioning=class_config("lit_methods.diffusion.Labels", num_classes=10),
                sampling={"solver": class_config("lit_methods.diffusion.UMS"), "steps": 3, "guidance": 2.0},
                optimizer=ADAM,
                lr_scheduler=class_config("torch.optim.lr_scheduler.StepLR", step_size=2),
            ),
            "data": class_config("lit_methods.datamodules.DigitsDataModule", batch_size=32),
        },
        make=lambda: _model(sampling=Sampling("ddim", steps=2)),
        forward_inputs=lambda: (torch.ones(3, 2), torch.tensor([0.1, 0.5, 0.9])),
        bad=[
            (lambda: MultiplicativeDiffusion(TimeMLP([2]), shape=[]), "shape must hold"),
            (lambda: _model(process=GeometricBrownian(volatility=0.0)), "volatility must be > 0 and finite"),
            (lambda: _model(process=GeometricBrownian(mu=float("nan"))), "mu must be finite"),
            (lambda: _model(process=GeometricBrownian(t_max=0.0)), "t_max must be"),
            (lambda: _model(process=GeometricBrownian(t_min=2.0)), "t_min must be"),
            (lambda: _model(data=PositiveData(shift=-1.0)), "shift must be"),
            (lambda: _model(data=PositiveData(range=(2.0, 1.0))), "range must be"),
            (lambda: _model(data=PositiveData(prior="row")), "prior must be"),  # type: ignore[arg-type]
            (lambda: _model(data=PositiveData(max_batches=0)), "max_batches must be"),
            (lambda: _model(prediction="score"), "prediction must be one of"),
            (lambda: _model(network_input="sqrt"), "network_input must be one of"),
            (lambda: _model(weighting="paper"), "weighting must be one of"),
            (lambda: _model(time_sampler=PowerTimes(0.0)), "power must be"),
            (lambda: _model(sampling=Sampling("adls")), "solver must be one of"),
            (lambda: _model(seed=-1), "seed must be"),
        ],
    ),
}

OPTIMIZERS: dict[str, OptimizerCase] = {
    "lit_methods.optim.ExponentiatedGradient": OptimizerCase(
        ExponentiatedGradient, {"lr": 0.2, **_MOMENTUM}, bad=[*_BAD_MOMENTUM, *_BAD_EXPONENTIATED], host_syncs=True
    ),
    "lit_methods.optim.AdamWExponentiated": OptimizerCase(
        AdamWExponentiated,
        {"lr": 0.02, "amsgrad": True},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"betas": (0.9, 1.0)}, "betas must be"),
            ({"eps": -1e-8}, "eps must be"),
            ({"weight_decay": 1001.0}, "weight_decay must be < 1 / lr"),
            *_BAD_EXPONENTIATED,
        ],
        host_syncs=True,
    ),
    "lit_methods.optim.SignConstrainedSGD": OptimizerCase(
        SignConstrainedSGD, {"lr": 0.1, **_MOMENTUM}, bad=_BAD_MOMENTUM, host_syncs=True
    ),
}

CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.DaleMonitor": CallbackCase(
        DaleMonitor,
        bad=[
            (lambda: DaleMonitor(every_n_epochs=0), "every_n_epochs must be"),
            (lambda: DaleMonitor(pattern="("), "pattern must be"),
        ],
    ),
}

DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.SparseTeacherDataModule": DataModuleCase(
        lambda folder, **arguments: SparseTeacherDataModule(
            **(
                {"num_inputs": 6, "num_relevant": 2, "train_size": 30, "val_size": 8, "test_size": 8, "batch_size": 4}
                | arguments
            )
        ),
        bad=[
            *LOADER_ARGUMENTS,
            ({"num_inputs": 0}, "num_inputs=0: must be"),
            ({"num_relevant": 7}, "num_relevant=7: must be"),
            ({"train_size": 0}, "train_size=0: must be"),
            ({"test_size": -1}, "test_size=-1: must be"),
            ({"noise_std": -1.0}, "noise_std=-1.0: must be"),
        ],
    ),
}

RECIPES: dict[str, RecipeCase] = {
    "dale_langevin/digits": RecipeCase(
        ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.check_val_every_n_epoch=1"],
        callbacks={"SampleQuality": {"variants": {"dls": {"solver": "dls", "steps": 2}}}},
    ),
    "dale_langevin/eg_digits": RecipeCase(TINY),
    "dale_langevin/eg_sparse_teacher": RecipeCase([*TINY, "--trainer.check_val_every_n_epoch=1"]),
    "dale_langevin/fashion_mnist": RecipeCase(
        [
            *TINY,
            "--data.data_dir=.",
            "--data.val_size=8",
            "--data.batch_size=8",
            f"--model.net.init_args.model={json.dumps(_TINY_UNET)}",
            "--model.sampling.steps=2",
        ],
        prepare=write_mnist,
        callbacks={"SampleGrid": {"num_samples": 2}},
    ),
}
