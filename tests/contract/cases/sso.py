"""Cases of the family: sso."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lit_methods.callbacks import (
    SurrogateMonitor,
    TargetCapture,
)
from lit_methods.datamodules import (
    LibSVMDataModule,
    MatrixFactorizationDataModule,
)
from lit_methods.nets import MLP
from lit_methods.optim import (
    SSO,
    ArmijoSGD,
)
from lit_methods.optim.sso import GaussNewton
from lit_methods.supervised import SSOModule
from tests.contract.cases.kinds import (
    LOADER_ARGUMENTS,
    TINY,
    CallbackCase,
    DataModuleCase,
    ModuleCase,
    OptimizerCase,
    RecipeCase,
    class_config,
)


def _libsvm(folder: Path, **arguments: Any) -> LightningDataModule:
    file = folder / "data"
    if not file.exists():
        file.write_text("".join(f"{1 - i % 2 * 2} {i % 5 + 1}:{i / 7:.3f} {i % 3 + 7}:1\n" for i in range(40)))
    return LibSVMDataModule(**({"train_file": str(file), "batch_size": 4, "val_size": 6, "test_size": 5} | arguments))


OPTIMIZERS: dict[str, OptimizerCase] = {
    "lit_methods.optim.SSO": OptimizerCase(
        SSO,
        {"lr": 0.1, "inner": GaussNewton(steps=3), "weight_decay": 1e-3},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"lr": None, "loss": "hinge"}, "lr=None takes 1/L of loss"),
            ({"loss": "hinge"}, "loss must be"),
            ({"inner": "newton"}, "inner must be"),
            ({"rule": "linear"}, "rule must be"),
            ({"rule": "newton"}, "loss must be 'bce'"),
            ({"rule": "exponential"}, "lacks the number of steps"),
            ({"divergence": "kl", "rule": "armijo"}, "divergence must be 'euclidean'"),
            ({"divergence": "bregman"}, "divergence must be"),
            ({"reduction": "none"}, "reduction must be"),
            ({"num_batch_dims": 0}, "num_batch_dims must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
            ({"max_target_grad_norm": 0.0}, "max_target_grad_norm must be"),
        ],
        host_syncs=True,
        module_argument="target_module",
        not_applicable={
            "check_skips_missing_gradients": (
                "Parameters move by the targets alone, and weight decay is part of the objective; "
                "tests/unit/optim/sso/test_sso.py shows what stays."
            ),
        },
    ),
    "lit_methods.optim.ArmijoSGD": OptimizerCase(
        ArmijoSGD,
        {"lr": 0.1},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"c": 1.0}, "c must be"),
            ({"decay": 1.0}, "decay must be"),
            ({"grow": 0.9}, "grow must be"),
            ({"max_trials": 0}, "max_trials must be"),
        ],
        closure_calls=2,
        host_syncs=True,
        not_applicable={
            "check_works_with_or_refuses_a_gradient_scaler": (
                "GradScaler refuses closures by itself, and a step without one is refused by name."
            ),
        },
    ),
}


MODULES: dict[str, ModuleCase] = {
    "lit_methods.supervised.SSOModule": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.supervised.SSOModule",
                network=class_config("lit_methods.nets.MLP", in_features=64, hidden_features=[16], out_features=10),
                num_classes=10,
                optimizer=class_config(
                    "lit_methods.optim.SSO",
                    lr=None,
                    loss="ce",
                    rule="armijo",
                    inner=class_config("lit_methods.optim.sso.GaussNewton", steps=3),
                ),
                lr_scheduler=class_config("torch.optim.lr_scheduler.StepLR", step_size=1),
            ),
            "data": class_config("lit_methods.datamodules.DigitsDataModule", batch_size=32),
        },
        make=lambda: SSOModule(MLP(64, [16], 10), num_classes=10),
        forward_inputs=lambda: (torch.ones(2, 1, 8, 8),),
        bad=[(lambda: SSOModule(MLP(4, [], 1), num_classes=1), "num_classes must be")],
    ),
}


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.LibSVMDataModule": DataModuleCase(
        _libsvm,
        bad=[
            *LOADER_ARGUMENTS,
            ({"task": "ranking"}, "task='ranking': must be"),
            ({"num_features": 0}, "num_features=0: must be"),
            ({"test_size": -1}, "test_size=-1: must be"),
        ],
    ),
    "lit_methods.datamodules.MatrixFactorizationDataModule": DataModuleCase(
        lambda folder, **arguments: MatrixFactorizationDataModule(**({"batch_size": 4} | arguments)),
        bad=[
            *LOADER_ARGUMENTS[:3],
            ({"num_samples": 0}, "num_samples=0: must be"),
            ({"in_features": 0}, "in_features=0: must be"),
            ({"out_features": 0}, "out_features=0: must be"),
            ({"dtype": "int8"}, "dtype='int8': must be"),
        ],
    ),
}


CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.SurrogateMonitor": CallbackCase(
        SurrogateMonitor, bad=[(lambda: SurrogateMonitor(every_n_steps=0), "every_n_steps must be")]
    ),
    "lit_methods.callbacks.TargetCapture": CallbackCase(
        TargetCapture,
        bad=[],
        not_applicable={
            "check_attaches_to_an_unrelated_module": "It refuses modules without an SSO, as its docstring says.",
            "check_state_survives_a_checkpoint": "It connects two objects at the start and keeps nothing.",
        },
    ),
}


RECIPES: dict[str, RecipeCase] = {
    "sso/digits": RecipeCase(TINY),
    "sso/imitation": RecipeCase(["--trainer.max_epochs=2", "--data.samples_per_round=20", "--data.eval_episodes=1"]),
    "sso/logistic": RecipeCase(TINY),
    "sso/matrix_factorization": RecipeCase(TINY),
}
