"""Cases of the family: sensing."""

from lit_methods.callbacks import (
    FactorRebalancing,
)
from lit_methods.datamodules import (
    SensingDataModule,
)
from lit_methods.optim import (
    ScaledGD,
)
from lit_methods.sensing import AsymmetricSensing, SymmetricSensing
from tests.contract.cases.kinds import (
    LOADER_ARGUMENTS,
    CallbackCase,
    DataModuleCase,
    ModuleCase,
    OptimizerCase,
    RecipeCase,
    class_config,
)

_TINY_SENSING = ["--trainer.max_epochs=2", "--trainer.val_check_interval=4", "--data.steps_per_epoch=8"]

OPTIMIZERS: dict[str, OptimizerCase] = {
    "lit_methods.optim.ScaledGD": OptimizerCase(  # whole models; tests/unit/optim/test_scaled_gd.py has the factors
        ScaledGD,
        {"lr": 0.5, "damping": None},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"damping": -0.1}, "damping must be"),
        ],
        host_syncs=True,
    ),
}


MODULES: dict[str, ModuleCase] = {
    "lit_methods.sensing.SymmetricSensing": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.sensing.SymmetricSensing", size=6, factor_rank=3, init_scales=[0.5, 0.2]
            ),
            "data": class_config(
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
            (lambda: SymmetricSensing(6, 3, (0.1, 0.1)), "init_scales must differ"),
        ],
    ),
    "lit_methods.sensing.AsymmetricSensing": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.sensing.AsymmetricSensing", rows=6, columns=4, factor_rank=3, init_scales=[0.5, 0.2]
            ),
            "data": class_config(
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


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.SensingDataModule": DataModuleCase(
        lambda folder, **arguments: SensingDataModule(
            **({"rows": 5, "rank": 2, "num_measurements": 20, "batch_size": 4} | arguments)
        ),
        bad=[
            *LOADER_ARGUMENTS[:3],
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
}


CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.FactorRebalancing": CallbackCase(
        lambda: FactorRebalancing("layer.weight", "layer.weight", at_step=2),
        bad=[
            (lambda: FactorRebalancing(at_step=0), "at_step must be"),
            (lambda: FactorRebalancing(loss_fraction=1.0), "loss_fraction must be"),
            (lambda: FactorRebalancing(beta=0.0), "beta must be"),
            (lambda: FactorRebalancing(beta=float("nan")), "beta must be"),
            (lambda: FactorRebalancing(rank=0), "rank must be"),
        ],
    ),
}


RECIPES: dict[str, RecipeCase] = {
    "matrix_sensing/asymmetric": RecipeCase(_TINY_SENSING),
    "matrix_sensing/gaussian_one_step": RecipeCase([*_TINY_SENSING, "--data.num_measurements=50"]),
    "matrix_sensing/lora_digits": RecipeCase(["--trainer.max_epochs=4"]),
    "matrix_sensing/lora_digits_one_step": RecipeCase(["--trainer.max_epochs=4"]),
    "matrix_sensing/one_step": RecipeCase(_TINY_SENSING),
    "matrix_sensing/symmetric": RecipeCase(_TINY_SENSING),
    "matrix_sensing/symmetric_exact": RecipeCase(_TINY_SENSING),
}
