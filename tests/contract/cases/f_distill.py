"""Cases of the family: f-distill."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_methods.datamodules import ArrayFilesDataModule, GaussianMixtureDataModule
from lit_methods.diffusion import Denoiser, FDistill, TimeMLP
from tests.contract.cases.kinds import (
    ADAM,
    LOADER_ARGUMENTS,
    TINY,
    DataModuleCase,
    ModuleCase,
    RecipeCase,
    class_config,
)
from tests.standins.digits_teacher import write_digits_teacher


def _teacher() -> Denoiser:
    return Denoiser(TimeMLP([2], width=8), "edm", "edm", "edm")


MODULES: dict[str, ModuleCase] = {
    "lit_methods.diffusion.FDistill": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.diffusion.FDistill",
                teacher=class_config(
                    "lit_methods.diffusion.Denoiser",
                    net=class_config("lit_methods.diffusion.TimeMLP", shape=[1, 8, 8], width=16, num_classes=10),
                    process="edm",
                    prediction="edm",
                    precondition="edm",
                    conditioning=class_config("lit_methods.diffusion.Labels", num_classes=10),
                ),
                student_every=2,
                student_times=[80.0, 1.0],
                guidance_scale=2.0,
                ratio={"spacing": "quantile", "ema": 0.5},
                critics={"r1_weight": 1.0},
                optimizer=ADAM,
                lr_scheduler=class_config("torch.optim.lr_scheduler.StepLR", step_size=2),
            ),
            "data": class_config("lit_methods.datamodules.DigitsDataModule", batch_size=32),
        },
        make=lambda: FDistill(_teacher()),
        forward_inputs=lambda: (torch.ones(3, 2), torch.tensor([0.1, 0.5, 0.9])),
        bad=[
            (lambda: FDistill(_teacher(), divergence="chi2"), "divergence must be one of"),
            (lambda: FDistill(_teacher(), gan_weight=-1.0), "gan_weight must be"),
            (lambda: FDistill(_teacher(), gan_weight=0.0), "gan_weight must be > 0 for divergence='js'"),
            (lambda: FDistill(_teacher(), student_every=1), "student_every must be"),
            (lambda: FDistill(_teacher(), student_times=[1.0]), "student_times must begin"),
            (lambda: FDistill(_teacher(), guidance_scale=2.0), "guidance_scale=2.0 needs a teacher"),
            (lambda: FDistill(_teacher(), time_sampler="beta"), "time_sampler must be one of"),
            (lambda: FDistill(_teacher(), grad_norm="l1"), "grad_norm must be"),
            (lambda: FDistill(_teacher(), grad_clip=0.0), "grad_clip must be"),
            (lambda: FDistill(_teacher(), seed=-1), "seed must be"),
        ],
    ),
}


def _array_files(folder: Path, **arguments: Any) -> ArrayFilesDataModule:
    draw = np.random.default_rng(0)
    for split, size in (("train", 70), ("val", 33), ("test", 35)):
        np.save(folder / f"{split}_x.npy", draw.integers(0, 256, (size, 1, 2, 2), np.uint8))
        np.save(folder / f"{split}_y.npy", draw.integers(0, 3, size))
    return ArrayFilesDataModule(**({"data_dir": str(folder), "batch_size": 16} | arguments))


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.ArrayFilesDataModule": DataModuleCase(
        _array_files,
        bad=[
            *(argument for argument in LOADER_ARGUMENTS if "val_size" not in argument[0]),
            ({"value_range": (1.0, 0.0)}, "value_range=.*: must be"),
        ],
    ),
    "lit_methods.datamodules.GaussianMixtureDataModule": DataModuleCase(
        lambda folder, **arguments: GaussianMixtureDataModule(
            **({"means": [[-1.0, 0.0], [1.0, 0.5]], "stds": [0.5, 1.0], "batch_size": 16} | arguments)
        ),
        bad=[
            *LOADER_ARGUMENTS,
            ({"means": []}, "means=.*: must be one or more"),
            ({"means": [[0.0], [1.0, 2.0]]}, "means=.*: must be one or more equally long"),
            ({"stds": [1.0]}, "stds=.*: must be as many numbers > 0"),
            ({"stds": [1.0, 0.0]}, "stds=.*: must be as many numbers > 0"),
            ({"weights": [1.0, -1.0]}, "weights=.*: must be as many numbers > 0"),
            ({"train_size": 0}, "train_size=0: must be"),
            ({"test_size": -1}, "test_size=-1: must be"),
        ],
    ),
}


def _teacher_file(folder: Path) -> None:
    write_digits_teacher(folder / "logs/diffusion_principles/digits_flow/version_0/checkpoints/last.ckpt")


_OFTEN = [*TINY, "--trainer.check_val_every_n_epoch=1"]

RECIPES: dict[str, RecipeCase] = {
    "f_distill/digits": RecipeCase(_OFTEN, _teacher_file),
    "f_distill/gaussian_student": RecipeCase(
        [*_OFTEN, "--data.train_size=2048", "--data.val_size=64", "--data.test_size=64"]
    ),
}
