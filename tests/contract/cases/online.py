"""Cases of the family: online."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lit_methods.datamodules import (
    CovertypeDataModule,
    DriftingDigitsDataModule,
    ImitationDataModule,
    SEADataModule,
)
from lit_methods.nets import MLP, LinearFeedback
from lit_methods.online import OnlineImitation, OnlineLearning
from lit_methods.optim import (
    ExtraAdam,
    ExtraGradient,
    ImplicitOMD,
    OptimisticAdam,
    OptimisticEnsemble,
    OptimisticFTL,
    OptimisticFTRL,
    OptimisticOMD,
    OptimisticOnlineNewton,
)
from tests.contract.cases.kinds import (
    LOADER_ARGUMENTS,
    Arguments,
    DataModuleCase,
    ModuleCase,
    OptimizerCase,
    RecipeCase,
    class_config,
)
from tests.standins.covertype_files import write_covertype

_ADAM_ARGUMENTS: list[tuple[Arguments, str]] = [
    ({"lr": -1.0}, "lr must be"),
    ({"betas": (0.9, 1.0)}, "betas must be"),
    ({"eps": 0.0}, "eps must be"),
    ({"weight_decay": -0.1}, "weight_decay must be"),
]

_PENDULUM_EXPERT = [[-0.7, -6.8, -0.9, -1.1]]


def _imitation(folder: Path, **arguments: Any) -> LightningDataModule:
    given = {"env": "InvertedPendulum-v5", "expert": LinearFeedback(_PENDULUM_EXPERT), "batch_size": 4}
    return ImitationDataModule(**(given | {"samples_per_round": 40, "eval_episodes": 1} | arguments))


def _covertype(folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_covertype(folder)
    arguments.pop("seed", None)  # nothing is drawn
    return CovertypeDataModule(**({"data_dir": folder, "download": False} | arguments))


OPTIMIZERS: dict[str, OptimizerCase] = {
    "lit_methods.optim.OptimisticOMD": OptimizerCase(
        OptimisticOMD,
        {"lr": 2.0, "delta": 0.1, "weight_decay": 1e-3},
        host_syncs=True,
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"step_size": "sqrt"}, "step_size must be"),
            ({"mirror": "lp"}, "mirror must be"),
            ({"optimism": "next"}, "optimism must be"),
            ({"delta": -1.0}, "delta must be"),
            ({"grad_bound": 0.0}, "grad_bound must be"),
            ({"strong_convexity": None, "step_size": "strongly_convex"}, "needs strong_convexity"),
            ({"strong_convexity": -1.0}, "strong_convexity must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
            ({"step_size": "adaptive", "mirror": "adagrad"}, "must be 'constant'"),
        ],
    ),
    "lit_methods.optim.OptimisticOnlineNewton": OptimizerCase(
        OptimisticOnlineNewton,
        {"lr": 0.1, "beta": 1.0, "epsilon": 0.5},
        host_syncs=True,
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"beta": 0.0}, "beta must be"),
            ({"epsilon": -1.0}, "epsilon must be"),
            ({"radius": 0.0}, "radius must be"),
            ({"optimism": "next"}, "optimism must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
            ({"max_dim": 1}, "max_dim=1 is less than the 2"),
        ],
    ),
    "lit_methods.optim.OptimisticEnsemble": OptimizerCase(
        OptimisticEnsemble,
        {"diameter": 2.0, "grad_bound": 2.0, "smoothness": 0.5, "horizon": 400},
        host_syncs=True,
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"diameter": 0.0}, "diameter must be"),
            ({"grad_bound": -1.0}, "grad_bound must be"),
            ({"smoothness": 0.0}, "smoothness must be"),
            ({"horizon": 0}, "horizon must be"),
            ({"step_sizes": [0.1, -0.1]}, "step_sizes must hold"),
            ({"stability": -1.0}, "stability must be"),
            ({"meta": "hedge"}, "meta must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
        ],
    ),
    "lit_methods.optim.OptimisticFTRL": OptimizerCase(
        OptimisticFTRL,
        {"lr": 2.0, "nu": 4.0},
        host_syncs=True,
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"nu": 0.0}, "nu must be"),
            ({"optimism": "next"}, "optimism must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
        ],
    ),
    "lit_methods.optim.OptimisticFTL": OptimizerCase(
        OptimisticFTL,
        {"strong_convexity": 1.0},
        host_syncs=True,
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"strong_convexity": 0.0}, "strong_convexity must be"),
            ({"optimism": "next"}, "optimism must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
        ],
    ),
    "lit_methods.optim.ImplicitOMD": OptimizerCase(
        ImplicitOMD,
        {"lr": 2.0, "inner_steps": 2},
        host_syncs=True,
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"inner_steps": 0}, "inner_steps must be"),
            ({"grad_bound": 0.0}, "grad_bound must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
        ],
        closure_calls=4,
    ),
    "lit_methods.optim.OptimisticAdam": OptimizerCase(
        OptimisticAdam, {"lr": 0.02, "weight_decay": 1e-3}, bad=[*_ADAM_ARGUMENTS], host_syncs=True
    ),
    "lit_methods.optim.ExtraGradient": OptimizerCase(
        ExtraGradient,
        {"lr": 0.1},
        host_syncs=True,
        bad=[({"lr": -1.0}, "lr must be"), ({"weight_decay": -0.1}, "weight_decay must be")],
        closure_calls=2,
    ),
    "lit_methods.optim.ExtraAdam": OptimizerCase(
        ExtraAdam, {"lr": 0.02}, bad=[*_ADAM_ARGUMENTS], closure_calls=2, host_syncs=True
    ),
}


MODULES: dict[str, ModuleCase] = {
    "lit_methods.online.OnlineImitation": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.online.OnlineImitation",
                policy=class_config("lit_methods.nets.MLP", in_features=4, hidden_features=[8], out_features=1),
                optimizer=class_config(
                    "lit_methods.optim.SSO",
                    lr=0.5,
                    rule="adagrad",
                    inner=class_config("lit_methods.optim.sso.OptimizerSteps", steps=3),
                ),
            ),
            "data": class_config(
                "lit_methods.datamodules.ImitationDataModule",
                env="InvertedPendulum-v5",
                expert=class_config("lit_methods.nets.LinearFeedback", gain=_PENDULUM_EXPERT),
                samples_per_round=12,
                eval_episodes=1,
                batch_size=3,
            ),
        },
        trainer={"reload_dataloaders_every_n_epochs": 1, "val_check_interval": 1.0},
        make=lambda: OnlineImitation(MLP(4, [8], 1)),
        forward_inputs=lambda: (torch.ones(2, 4),),
        bad=[],
    ),
    "lit_methods.online.OnlineLearning": ModuleCase(
        may_be_infinite=frozenset({"radius"}),
        config={
            "model": class_config(
                "lit_methods.online.OnlineLearning",
                dim=5,
                loss="logistic",
                optimizer=class_config(
                    "lit_methods.optim.OptimisticOMD",
                    lr=2.0,
                    constraint=class_config("lit_methods.optim.Ball", radius=1.0),
                ),
            ),
            "data": class_config(
                "lit_methods.datamodules.SEADataModule", kind="drift", loss="logistic", dim=5, rounds=8
            ),
        },
        make=lambda: OnlineLearning(5, "logistic"),
        forward_inputs=lambda: (torch.ones(2, 5),),
        bad=[
            (lambda: OnlineLearning(0), "dim must be"),
            (lambda: OnlineLearning(2, "log"), "loss must be"),  # type: ignore[arg-type]
            (lambda: OnlineLearning(2, radius=0.0), "radius must be"),
        ],
    ),
}


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.ImitationDataModule": DataModuleCase(
        _imitation,
        bad=[
            *LOADER_ARGUMENTS[:3],
            ({"samples_per_round": 0}, "samples_per_round=0: must be"),
            ({"num_envs": 0}, "num_envs=0: must be"),
            ({"beta": 1.5}, "beta=1.5: must be"),
            ({"beta_decay": -0.5}, "beta_decay=-0.5: must be"),
            ({"actions": "round"}, "actions='round': must be"),
            ({"eval_episodes": 0}, "eval_episodes=0: must be"),
        ],
    ),
    "lit_methods.datamodules.SEADataModule": DataModuleCase(
        lambda folder, **arguments: SEADataModule(**({"dim": 4, "rounds": 10} | arguments)),
        bad=[
            *LOADER_ARGUMENTS[1:3],
            ({"kind": "chaos"}, "kind='chaos': must be one of"),
            ({"loss": "log"}, "loss='log': must be one of"),
            ({"loss": "abs", "kind": "random_order"}, "loss='abs': needs loss linear"),
            ({"dim": 1}, "dim=1: must be"),
            ({"rounds": 0}, "rounds=0: must be"),
            ({"noise": -0.1}, "noise=-0.1: must be"),
            ({"drift": 0.0}, "drift=0.0: must be"),
            ({"stages": 0}, "stages=0: must be"),
            ({"corruption": 1.5}, "corruption=1.5: must be"),
            ({"radius": 0.0}, "radius=0.0: must be"),
            ({"samples_per_round": 0}, "samples_per_round=0: must be"),
            ({"dtype": "int8"}, "dtype='int8': must be"),
        ],
    ),
    "lit_methods.datamodules.CovertypeDataModule": DataModuleCase(
        _covertype,
        bad=[LOADER_ARGUMENTS[1], ({"samples_per_round": 0}, "samples_per_round=0: must be")],
        not_applicable={
            "check_batches_are_a_function_of_the_seed": "Its rounds are the file's rows, in order; no seed matters.",
            "check_epochs_differ": "The same rows again.",
        },
    ),
    "lit_methods.datamodules.DriftingDigitsDataModule": DataModuleCase(
        lambda folder, **arguments: DriftingDigitsDataModule(**({"rounds": 10} | arguments)),
        bad=[
            *LOADER_ARGUMENTS[1:3],
            ({"rounds": 0}, "rounds=0: must be"),
            ({"max_angle": 181.0}, "max_angle=181.0: must be"),
            ({"period": 1}, "period=1: must be"),
            ({"samples_per_round": 0}, "samples_per_round=0: must be"),
        ],
    ),
}


RECIPES: dict[str, RecipeCase] = {
    **{
        f"optimistic_omd/{name}": RecipeCase(
            ["--data.rounds=20", "--trainer.val_check_interval=5", "--trainer.max_epochs=2"]
        )
        for name in (
            "adversarial",
            "drifting_digits",
            "dynamic",
            "exp_concave",
            "noiseless_drift",
            "stochastic",
            "strongly_convex",
        )
    },
    "optimistic_omd/bilinear": RecipeCase(["--model.rounds=5", "--trainer.max_epochs=2"]),
    "optimistic_omd/rock_paper_scissors": RecipeCase(["--model.rounds=5", "--trainer.max_epochs=2"]),
    "optimistic_omd/ring_gan": RecipeCase(["--model.steps_per_epoch=3", "--trainer.max_epochs=2"]),
}
