"""Cases of the family: dale_langevin."""

from lit_methods.callbacks import DaleMonitor
from lit_methods.datamodules import SparseTeacherDataModule
from lit_methods.optim import AdamWExponentiated, ExponentiatedGradient, SignConstrainedSGD
from tests.contract.cases.kinds import LOADER_ARGUMENTS, TINY, CallbackCase, DataModuleCase, OptimizerCase, RecipeCase

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
    "dale_langevin/eg_sparse_teacher": RecipeCase(TINY),
    "dale_langevin/eg_digits": RecipeCase(TINY),
}
