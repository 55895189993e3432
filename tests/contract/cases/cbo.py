"""Cases of the family: cbo."""

import math
from typing import Any

import torch

from lit_methods.black_box import CBOModule, LandscapeMinimization, Rastrigin
from lit_methods.callbacks import (
    CBOCooling,
    LandscapePaths,
)
from lit_methods.nets import MLP, PostNormMLP
from lit_methods.optim import (
    CBO,
    AdamCBO,
    AnnealedLangevin,
    ConsensusBasedSampling,
    ConsensusHopping,
    MemoryCBO,
    PolarizedCBO,
)
from lit_methods.optim.cbo import InitialCloud, ParticleBatches
from tests.contract.cases.kinds import (
    TINY,
    Arguments,
    CallbackCase,
    ModuleCase,
    OptimizerCase,
    RecipeCase,
    class_config,
)
from tests.standins.idx_files import write_mnist

_LOSSES_ONLY = {
    "check_skips_missing_gradients": (
        "Gradients are never read; a parameter that the loss does not depend on follows the particles, as documented."
    ),
}

_SWARM = {"init": InitialCloud(0.5, around_current=True), "seed": 0}

_SWARM_ARGUMENTS: list[tuple[Arguments, str]] = [
    ({"num_runs": 0}, "num_runs must be"),
    ({"seed": -1}, "seed must be"),
]


def _landscape(**arguments: Any) -> LandscapeMinimization:
    return LandscapeMinimization(**({"objective": Rastrigin(), "methods": {"cbo": CBO}, "start": [1.0]} | arguments))


_TINY_LANDSCAPE = ["--model.num_runs=2", "--model.steps_per_epoch=3", "--trainer.max_epochs=2"]

OPTIMIZERS: dict[str, OptimizerCase] = {
    "lit_methods.optim.AnnealedLangevin": OptimizerCase(
        AnnealedLangevin,
        {"lr": 0.05, "sigma": 0.01},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"lr": math.inf}, "lr must be"),
            ({"sigma": -1.0}, "sigma must be"),
            ({"seed": -1}, "seed must be"),
        ],
        host_syncs=True,
        draws_noise=True,
    ),
    "lit_methods.optim.CBO": OptimizerCase(
        CBO,
        {"num_particles": 20, "batches": ParticleBatches(10), "init": InitialCloud(0.5, True), "seed": 0},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"lambda_": 0.0}, "lambda_ must be"),
            ({"sigma": -1.0}, "sigma must be"),
            ({"num_particles": 0}, "num_particles must be"),
            ({"alpha": -1.0}, "alpha must be"),
            ({"noise": "gaussian"}, "noise must be"),
            ({"stall_tol": -1.0}, "stall_tol must be"),
            ({"num_runs": 0}, "num_runs must be"),
            ({"gradient_drift": -1.0}, "gradient_drift must be"),
            ({"seed": -1}, "seed must be"),
            ({"shard": "model"}, "shard must be"),
        ],
        closure_calls=21,
        may_be_infinite=frozenset({"alpha"}),
        host_syncs=True,
        draws_noise=True,
        not_applicable=_LOSSES_ONLY,
    ),
    "lit_methods.optim.ConsensusHopping": OptimizerCase(
        ConsensusHopping,
        {"num_particles": 20, "alpha": 50.0, "width": 0.2, "seed": 0},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"lr": 1.5}, "lr must be"),
            ({"num_particles": 1}, "num_particles must be"),
            ({"alpha": -1.0}, "alpha must be"),
            ({"width": 0.0}, "width must be"),
            ({"width_decay": 1.5}, "width_decay must be"),
            ({"width_decay_every": 0}, "width_decay_every must be"),
            ({"num_runs": 0}, "num_runs must be"),
            ({"seed": -1}, "seed must be"),
            ({"shard": "model"}, "shard must be"),
        ],
        closure_calls=21,
        may_be_infinite=frozenset({"alpha"}),
        host_syncs=True,
        draws_noise=True,
        not_applicable=_LOSSES_ONLY,
    ),
    "lit_methods.optim.ConsensusBasedSampling": OptimizerCase(
        ConsensusBasedSampling,
        {"mode": "optimization", "alpha": 50.0, "num_particles": 60, **_SWARM},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"num_particles": 1}, "num_particles must be"),
            ({"alpha": -1.0}, "alpha must be"),
            ({"alpha": math.inf}, "alpha must be"),
            ({"mode": "both"}, "mode must be"),
            *_SWARM_ARGUMENTS,
        ],
        closure_calls=61,
        may_be_infinite=frozenset({"alpha"}),
        host_syncs=True,
        draws_noise=True,
        not_applicable=_LOSSES_ONLY,
    ),
    "lit_methods.optim.MemoryCBO": OptimizerCase(
        MemoryCBO,
        {"num_particles": 30, **_SWARM},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"lambda_": 0.0}, "lambda_ must be"),
            ({"sigma": -1.0}, "sigma must be"),
            ({"num_particles": 0}, "num_particles must be"),
            ({"alpha": -1.0}, "alpha must be"),
            ({"lambda_memory": -1.0}, "lambda_memory must be"),
            ({"sigma_memory": -1.0}, "sigma_memory must be"),
            ({"shard": "model"}, "shard must be"),
            *_SWARM_ARGUMENTS,
        ],
        closure_calls=31,
        may_be_infinite=frozenset({"alpha"}),
        host_syncs=True,
        draws_noise=True,
        not_applicable={
            **_LOSSES_ONLY,
            "check_skips_steps_that_are_not_finite": "It remembers losses, and goes on with these.",
        },
    ),
    "lit_methods.optim.PolarizedCBO": OptimizerCase(
        PolarizedCBO,
        {"num_particles": 20, "kappa": 10.0, **_SWARM},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"lambda_": 0.0}, "lambda_ must be"),
            ({"sigma": -1.0}, "sigma must be"),
            ({"num_particles": 0}, "num_particles must be"),
            ({"alpha": -1.0}, "alpha must be"),
            ({"kappa": 0.0}, "kappa must be"),
            ({"noise": "gaussian"}, "noise must be"),
            *_SWARM_ARGUMENTS,
        ],
        closure_calls=21,
        may_be_infinite=frozenset({"alpha", "kappa"}),
        host_syncs=True,
        draws_noise=True,
        not_applicable=_LOSSES_ONLY,
    ),
    "lit_methods.optim.AdamCBO": OptimizerCase(
        AdamCBO,
        {"num_particles": 20, **_SWARM},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"lambda_": 0.0}, "lambda_ must be"),
            ({"sigma": -1.0}, "sigma must be"),
            ({"num_particles": 0}, "num_particles must be"),
            ({"alpha": -1.0}, "alpha must be"),
            ({"betas": (0.9, 1.0)}, "betas must be"),
            ({"eps": 0.0}, "eps must be"),
            ({"shard": "model"}, "shard must be"),
            *_SWARM_ARGUMENTS,
        ],
        closure_calls=21,
        may_be_infinite=frozenset({"alpha"}),
        host_syncs=True,
        draws_noise=True,
        not_applicable=_LOSSES_ONLY,
    ),
}


MODULES: dict[str, ModuleCase] = {
    "lit_methods.black_box.CBOModule": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.black_box.CBOModule",
                network=class_config("lit_methods.nets.PostNormMLP", in_features=64, widths=[12, 10]),
                num_classes=10,
                optimizer=class_config("lit_methods.optim.CBO", num_particles=8, batches={"size": 4}),
                lr_scheduler=class_config("torch.optim.lr_scheduler.StepLR", step_size=1),
            ),
            "data": class_config("lit_methods.datamodules.DigitsDataModule", batch_size=32),
        },
        make=lambda: CBOModule(PostNormMLP(64, [10]), num_classes=10),
        forward_inputs=lambda: (torch.ones(2, 1, 8, 8),),
        bad=[
            (lambda: CBOModule(MLP(4, [], 1), num_classes=1), "num_classes must be"),
            (lambda: CBOModule(MLP(4, [], 1), chunk_size=0), "chunk_size must be"),
        ],
    ),
    "lit_methods.black_box.LandscapeMinimization": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.black_box.LandscapeMinimization",
                objective=class_config("lit_methods.black_box.GrandCanyon"),
                methods={
                    "hopping": class_config("lit_methods.optim.ConsensusHopping", num_particles=8),
                    "cbo": class_config("lit_methods.optim.CBO", num_particles=8, batches={"size": None}),
                    "langevin": class_config("lit_methods.optim.langevin.AnnealedLangevin", lr=1e-3),
                },
                start=[8.0, 8.0],
                num_runs=2,
                inner_steps={"hopping": 2},
                steps_per_epoch=8,
            )
        },
        make=lambda: _landscape(num_runs=1),
        forward_inputs=lambda: (torch.ones(4, 2),),
        bad=[
            (lambda: _landscape(methods={}), "methods must name"),
            (lambda: _landscape(start=[]), "start must hold"),
            (lambda: _landscape(num_runs=0), "num_runs must be"),
            (lambda: _landscape(steps_per_epoch=0), "steps_per_epoch must be"),
            (lambda: _landscape(inner_steps={"sgd": 2}), "inner_steps must give"),
            (lambda: _landscape(tolerance=0.0), "tolerance must be"),
        ],
    ),
}


CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.CBOCooling": CallbackCase(
        lambda: CBOCooling(reduction=0.2),
        bad=[
            (lambda: CBOCooling(every_n_epochs=0), "every_n_epochs must be"),
            (lambda: CBOCooling(alpha_factor=0.5), "alpha_factor must be"),
            (lambda: CBOCooling(reduction=1.0), "reduction must be"),
        ],
    ),
    "lit_methods.callbacks.LandscapePaths": CallbackCase(
        LandscapePaths,
        bad=[
            (lambda: LandscapePaths(low=1.0, high=1.0), "low must be"),
            (lambda: LandscapePaths(every_n_steps=0), "every_n_steps must be"),
            (lambda: LandscapePaths(name="a/b"), "name must be"),
        ],
    ),
}


RECIPES: dict[str, RecipeCase] = {
    "cbo/ackley": RecipeCase(_TINY_LANDSCAPE),
    "cbo/digits": RecipeCase(TINY),
    "cbo/digits_hopping": RecipeCase(TINY),
    "cbo/fashion_mnist": RecipeCase([*TINY, "--data.data_dir=.", "--data.batch_size=8"], prepare=write_mnist),
    "cbo/illustrations": RecipeCase(_TINY_LANDSCAPE),
    "cbo/rastrigin": RecipeCase(_TINY_LANDSCAPE),
}
