"""One case per public piece: how to build it, what it must refuse, and why a check does not apply."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_methods.batches import InteractionBatch, SupervisedBatch
from lit_methods.black_box import CBOModule, LandscapeMinimization, Rastrigin
from lit_methods.callbacks import (
    CBOCooling,
    ConvergenceCurves,
    ConvergenceRates,
    EmpiricalFisherMonitor,
    ExactResume,
    ExportHF,
    FactorRebalancing,
    LandscapePaths,
    LearningCurves,
    MFACPruning,
    PolicyEvaluation,
    PolicyFrames,
    PruningCurve,
    ResultTable,
    SampleTable,
    SFTWarmup,
    SurrogateMonitor,
    TargetCapture,
    TransportTable,
    WinRate,
)
from lit_methods.datamodules import (
    BreastCancerDataModule,
    CIFAR10DataModule,
    CIFAR100DataModule,
    CovertypeDataModule,
    D4RLDataModule,
    DigitPointsDataModule,
    DigitsDataModule,
    DriftingDigitsDataModule,
    FashionMNISTDataModule,
    GLUEDataModule,
    ImitationDataModule,
    InteractionsDataModule,
    LibSVMDataModule,
    MatrixFactorizationDataModule,
    MNISTDataModule,
    MovieLensDataModule,
    MSDTasteProfileDataModule,
    NetflixPrizeDataModule,
    PromptDataModule,
    ReplayDataModule,
    RolloutDataModule,
    SEADataModule,
    SensingDataModule,
    TensorDataModule,
    WordGameDataModule,
    save_transitions_hdf5,
)
from lit_methods.games import MatrixGame, PreferenceGame, RingGAN
from lit_methods.llm import FunctionJudge, NashMP, SequenceClassification, SupervisedFineTuning
from lit_methods.llm.word_game import word_game_preference
from lit_methods.nets import MLP, LinearFeedback, PostNormMLP
from lit_methods.online import OnlineImitation, OnlineLearning
from lit_methods.optim import (
    CBO,
    MDPO,
    MFAC,
    SSO,
    AdamCBO,
    ArmijoSGD,
    ConsensusBasedSampling,
    ConsensusHopping,
    ExtraAdam,
    ExtraGradient,
    ImplicitOMD,
    MemoryCBO,
    OptimisticAdam,
    OptimisticEnsemble,
    OptimisticFTL,
    OptimisticFTRL,
    OptimisticOMD,
    OptimisticOnlineNewton,
    PolarizedCBO,
    ScaledGD,
)
from lit_methods.rl import OffPolicyMDPO, OnPolicyMDPO
from lit_methods.rl.networks import GaussianPolicy, TanhGaussianActor, TwinCritic, ValueNetwork
from lit_methods.sensing import AsymmetricSensing, SymmetricSensing
from lit_methods.supervised import SSOModule, SupervisedModule
from lit_methods.transport import OTGenerator, PointRegistration
from lit_methods.vi import MultDAE, MultVAE
from tests.cifar_files import write_cifar
from tests.covertype_files import write_covertype
from tests.glue_files import write_glue
from tests.idx_files import write_mnist
from tests.interaction_files import write_msd, write_netflix, write_u_data
from tests.unit.llm.tiny import save_tiny_chat

Arguments = dict[str, Any]


@dataclass(frozen=True)
class OptimizerCase:
    """``arguments`` must suit small problems; ``bad`` pairs one wrong argument with a pattern of the error."""

    optimizer: type[Optimizer]
    arguments: Arguments
    bad: list[tuple[Arguments, str]]
    closure_calls: int = 1
    host_syncs: bool = False  # whether the docstring declares host synchronisations
    draws_noise: bool = False  # whether steps are random: devices have different streams of random numbers
    module_argument: str | None = None  # the constructor's name for the module that holds the parameters
    not_applicable: dict[str, str] = field(default_factory=dict)

    def make(self, params: Any, module: nn.Module, **overrides: Any) -> Optimizer:
        """Build the optimizer of (some of) the module's parameters."""
        given = {self.module_argument: module} if self.module_argument else {}
        return self.optimizer(params, **(self.arguments | given | overrides))


@dataclass(frozen=True)
class ModuleCase:
    """``config`` is a CLI config of module and datamodule; ``make`` builds the module directly, without the CLI.

    ``prepare`` fills the working folder of a run with the data that ``config`` reads.
    """

    config: dict[str, Any]
    make: Callable[[], LightningModule]
    forward_inputs: Callable[[], tuple[Tensor, ...]]
    bad: list[tuple[Callable[[], object], str]]
    not_applicable: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Path], None] = lambda folder: None


@dataclass(frozen=True)
class DataModuleCase:
    """``make`` gets an empty folder, fills it with what the datamodule reads, and passes keyword arguments on."""

    make: Callable[..., LightningDataModule]
    bad: list[tuple[Arguments, str]]
    not_applicable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CallbackCase:
    """``make`` builds the callback for a two-epoch fit of an unrelated module."""

    make: Callable[[], Callback]
    bad: list[tuple[Callable[[], object], str]]
    not_applicable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RecipeCase:
    """``overrides`` make a tiny run of a small or slow recipe; ``prepare`` fills a folder with its data first."""

    overrides: list[str]
    prepare: Callable[[Path], None] = lambda folder: None


def _module(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


_ADAM_ARGUMENTS: list[tuple[Arguments, str]] = [
    ({"lr": -1.0}, "lr must be"),
    ({"betas": (0.9, 1.0)}, "betas must be"),
    ({"eps": 0.0}, "eps must be"),
    ({"weight_decay": -0.1}, "weight_decay must be"),
]

_LOSSES_ONLY = {
    "check_skips_missing_gradients": (
        "Gradients are never read; a parameter that the loss does not depend on follows the particles, as documented."
    ),
}

_SWARM = {"init_around_current": True, "seed": 0}
_SWARM_ARGUMENTS: list[tuple[Arguments, str]] = [
    ({"init_std": 0.0}, "init_std must be"),
    ({"num_runs": 0}, "num_runs must be"),
    ({"seed": -1}, "seed must be"),
]

OPTIMIZERS: dict[str, OptimizerCase] = {
    "lit_methods.optim.CBO": OptimizerCase(
        CBO,
        {"num_particles": 20, "particle_batch_size": 10, "init_std": 0.5, "init_around_current": True, "seed": 0},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"lambda_": 0.0}, "lambda_ must be"),
            ({"sigma": -1.0}, "sigma must be"),
            ({"num_particles": 0}, "num_particles must be"),
            ({"alpha": -1.0}, "alpha must be"),
            ({"noise": "gaussian"}, "noise must be"),
            ({"particle_batch_size": 0}, "particle_batch_size must be"),
            ({"update": "half"}, "update must be"),
            ({"init_std": 0.0}, "init_std must be"),
            ({"stall_tol": -1.0}, "stall_tol must be"),
            ({"effective_sample_size": 1.0}, "effective_sample_size must be"),
            ({"num_runs": 0}, "num_runs must be"),
            ({"gradient_drift": -1.0}, "gradient_drift must be"),
            ({"alpha_growth": 0.0}, "alpha_growth must be"),
            ({"seed": -1}, "seed must be"),
            ({"shard": "model"}, "shard must be"),
        ],
        closure_calls=21,
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
            ({"effective_sample_size": 0.0}, "effective_sample_size must be"),
            ({"num_runs": 0}, "num_runs must be"),
            ({"seed": -1}, "seed must be"),
            ({"shard": "model"}, "shard must be"),
        ],
        closure_calls=21,
        host_syncs=True,
        draws_noise=True,
        not_applicable=_LOSSES_ONLY,
    ),
    "lit_methods.optim.ConsensusBasedSampling": OptimizerCase(
        ConsensusBasedSampling,
        {"mode": "optimization", "alpha": 50.0, "num_particles": 60, "init_std": 0.5, **_SWARM},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"num_particles": 1}, "num_particles must be"),
            ({"alpha": -1.0}, "alpha must be"),
            ({"alpha": math.inf}, "alpha must be"),
            ({"mode": "both"}, "mode must be"),
            ({"effective_sample_size": 0.5}, "effective_sample_size must be"),
            *_SWARM_ARGUMENTS,
        ],
        closure_calls=61,
        host_syncs=True,
        draws_noise=True,
        not_applicable=_LOSSES_ONLY,
    ),
    "lit_methods.optim.MemoryCBO": OptimizerCase(
        MemoryCBO,
        {"num_particles": 30, "init_std": 0.5, **_SWARM},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"lambda_": 0.0}, "lambda_ must be"),
            ({"sigma": -1.0}, "sigma must be"),
            ({"num_particles": 0}, "num_particles must be"),
            ({"alpha": -1.0}, "alpha must be"),
            ({"lambda_memory": -1.0}, "lambda_memory must be"),
            ({"sigma_memory": -1.0}, "sigma_memory must be"),
            ({"effective_sample_size": 0.0}, "effective_sample_size must be"),
            ({"shard": "model"}, "shard must be"),
            *_SWARM_ARGUMENTS,
        ],
        closure_calls=31,
        host_syncs=True,
        draws_noise=True,
        not_applicable=_LOSSES_ONLY,
    ),
    "lit_methods.optim.PolarizedCBO": OptimizerCase(
        PolarizedCBO,
        {"num_particles": 20, "init_std": 0.5, "kappa": 10.0, **_SWARM},
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
        host_syncs=True,
        draws_noise=True,
        not_applicable=_LOSSES_ONLY,
    ),
    "lit_methods.optim.AdamCBO": OptimizerCase(
        AdamCBO,
        {"num_particles": 20, "init_std": 0.5, **_SWARM},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"lambda_": 0.0}, "lambda_ must be"),
            ({"sigma": -1.0}, "sigma must be"),
            ({"num_particles": 0}, "num_particles must be"),
            ({"alpha": -1.0}, "alpha must be"),
            ({"betas": (0.9, 1.0)}, "betas must be"),
            ({"eps": 0.0}, "eps must be"),
            ({"effective_sample_size": 0.0}, "effective_sample_size must be"),
            ({"shard": "model"}, "shard must be"),
            *_SWARM_ARGUMENTS,
        ],
        closure_calls=21,
        host_syncs=True,
        draws_noise=True,
        not_applicable=_LOSSES_ONLY,
    ),
    "lit_methods.optim.MDPO": OptimizerCase(
        MDPO,
        {"lr": 0.01, "inner_steps": 3},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"inner_steps": 0}, "inner_steps must be"),
            ({"step_size": 0.0}, "step_size must be"),
            ({"q": 2.5}, "q must be"),
            ({"anchor": "copy"}, "anchor must be"),
            ({"anchor_interval": 5}, "anchor_interval=5 needs"),
            ({"anchor_interval": 0, "anchor": "parameters"}, "anchor_interval must be"),
            ({"max_grad_norm": 0.0}, "max_grad_norm must be"),
        ],
        closure_calls=3,
    ),
    "lit_methods.optim.MFAC": OptimizerCase(
        MFAC,
        {"lr": 0.05, "num_grads": 8, "damping": 1e-2, "momentum": 0.5, "weight_decay": 1e-3},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"momentum": 1.0}, "momentum must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
            ({"num_grads": 0}, "num_grads must be"),
            ({"damping": 0.0}, "damping must be"),
            ({"history_dtype": "int8"}, "history_dtype must be"),
            ({"window_scale": "half"}, "window_scale must be"),
            ({"solver": "lu"}, "solver must be"),
            ({"solver": "rank2", "window_scale": "filled"}, "needs window_scale"),
        ],
    ),
    "lit_methods.optim.SSO": OptimizerCase(
        SSO,
        {"lr": 0.1, "inner_steps": 3, "weight_decay": 1e-3},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"lr": None, "loss": "hinge"}, "lr=None takes 1/L of loss"),
            ({"loss": "hinge"}, "loss must be"),
            ({"inner": "newton"}, "inner must be"),
            ({"inner_lr": 0.0}, "inner_lr must be"),
            ({"inner_lr": None, "inner": "sgd"}, "inner_lr must be given"),
            ({"inner_steps": 0}, "inner_steps must be"),
            ({"inner_tol": -1.0}, "inner_tol must be"),
            ({"inner_armijo_c": 1.0}, "inner_armijo_c must be"),
            ({"inner_grow": 0.5}, "inner_grow must be"),
            ({"rule": "linear"}, "rule must be"),
            ({"rule": "newton"}, "needs loss='bce'"),
            ({"total_steps": None, "rule": "exponential"}, "total_steps must be"),
            ({"rule": "armijo", "divergence": "kl"}, "needs divergence='euclidean'"),
            ({"divergence": "bregman"}, "divergence must be"),
            ({"armijo_c": 0.0}, "armijo_c must be"),
            ({"armijo_decay": 1.0}, "armijo_decay must be"),
            ({"armijo_grow": 0.5}, "armijo_grow must be"),
            ({"eta_bounds": (1.0, 0.5)}, "eta_bounds must be"),
            ({"adagrad_bounds": (0.0, 0.5)}, "adagrad_bounds must be"),
            ({"newton_damping": 0.0}, "newton_damping must be"),
            ({"reduction": "none"}, "reduction must be"),
            ({"num_batch_dims": 0}, "num_batch_dims must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
            ({"max_target_grad_norm": 0.0}, "max_target_grad_norm must be"),
            ({"sync_every": 0}, "sync_every must be"),
        ],
        host_syncs=True,
        module_argument="target_module",
        not_applicable={
            "check_skips_missing_gradients": (
                "Parameters move by the targets alone, and weight decay is part of the objective; "
                "tests/unit/optim/test_sso.py shows what stays."
            ),
        },
    ),
    "lit_methods.optim.ScaledGD": OptimizerCase(  # whole models; tests/unit/optim/test_scaled_gd.py has the factors
        ScaledGD,
        {"lr": 0.5, "damping": None},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"damping": -0.1}, "damping must be"),
        ],
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
    "lit_methods.optim.OptimisticOMD": OptimizerCase(
        OptimisticOMD,
        {"lr": 2.0, "delta": 0.1, "weight_decay": 1e-3},
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
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"inner_steps": 0}, "inner_steps must be"),
            ({"grad_bound": 0.0}, "grad_bound must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
        ],
        closure_calls=4,
    ),
    "lit_methods.optim.OptimisticAdam": OptimizerCase(
        OptimisticAdam, {"lr": 0.02, "weight_decay": 1e-3}, bad=[*_ADAM_ARGUMENTS]
    ),
    "lit_methods.optim.ExtraGradient": OptimizerCase(
        ExtraGradient,
        {"lr": 0.1},
        bad=[({"lr": -1.0}, "lr must be"), ({"weight_decay": -0.1}, "weight_decay must be")],
        closure_calls=2,
    ),
    "lit_methods.optim.ExtraAdam": OptimizerCase(ExtraAdam, {"lr": 0.02}, bad=[*_ADAM_ARGUMENTS], closure_calls=2),
}

_TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 33,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_WORDS = {"words": [f"{letter}{i}" for letter, n in zip("pabcx", (5, 7, 7, 7, 5), strict=True) for i in range(n)]}
_ADAM = _module("torch.optim.Adam", lr=1e-3)
_ROCK_PAPER_SCISSORS = [[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]


def _nash_mp(**arguments: Any) -> NashMP:
    judge = FunctionJudge(word_game_preference)
    return NashMP(**({"model": _TINY_LLAMA, "judge": judge, "tokenizer": _WORDS, "max_new_tokens": 4} | arguments))


_NO_FORWARD = {"check_compiles": "It samples and decodes texts and has no forward to capture."}

_TINY_BERT = {
    "model_type": "bert",
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}

_PENDULUM_EXPERT = [[-0.7, -6.8, -0.9, -1.1]]
_PENDULUM = {"observation_size": 3, "hidden_features": [8]}
_NETWORKS = "lit_methods.rl.networks."


def _on_policy(**arguments: Any) -> OnPolicyMDPO:
    return OnPolicyMDPO(GaussianPolicy(3, 1, [8]), ValueNetwork(3, [8]), 3, **arguments)


def _off_policy(**arguments: Any) -> OffPolicyMDPO:
    return OffPolicyMDPO(TanhGaussianActor(3, 1, [8]), TwinCritic(3, 1, [8]), ValueNetwork(3, [8]), **arguments)


_MOVIES = _module(
    "lit_methods.datamodules.MovieLensDataModule", version="100k", data_dir=".", num_heldout_users=10, batch_size=8
)
_AUTOENCODER_ARGUMENTS: list[tuple[Arguments, str]] = [
    ({"num_items": 0}, "num_items must be"),
    ({"hidden_dims": (0,)}, "hidden_dims must hold"),
    ({"latent_dim": 0}, "latent_dim must be"),
    ({"dropout": 1.0}, "dropout must be"),
    ({"likelihood": "poisson"}, "likelihood must be"),
    ({"positive_weight": 0.0}, "positive_weight must be"),
    ({"recall_at": (0,)}, "recall_at must hold"),
    ({"ndcg_at": (5, 5)}, "ndcg_at must hold"),
    ({"recall_at": (), "ndcg_at": ()}, "must not both be empty"),
    ({"num_recommendations": 0}, "num_recommendations must be"),
]


def _history() -> tuple[Any, ...]:
    nothing = torch.zeros(4, dtype=torch.int64)
    return (InteractionBatch(torch.tensor([0, 4, 2]), torch.tensor([0, 2, 2, 3]), None, nothing[:0], nothing),)


def _landscape(**arguments: Any) -> LandscapeMinimization:
    return LandscapeMinimization(**({"objective": Rastrigin(), "methods": {"cbo": CBO}, "start": [1.0]} | arguments))


MODULES: dict[str, ModuleCase] = {
    "lit_methods.black_box.CBOModule": ModuleCase(
        config={
            "model": _module(
                "lit_methods.black_box.CBOModule",
                network=_module("lit_methods.nets.PostNormMLP", in_features=64, widths=[12, 10]),
                num_classes=10,
                optimizer=_module("lit_methods.optim.CBO", num_particles=8, particle_batch_size=4),
                lr_scheduler=_module("torch.optim.lr_scheduler.StepLR", step_size=1),
            ),
            "data": _module("lit_methods.datamodules.DigitsDataModule", batch_size=32),
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
            "model": _module(
                "lit_methods.black_box.LandscapeMinimization",
                objective=_module("lit_methods.black_box.GrandCanyon"),
                methods={
                    "hopping": _module("lit_methods.optim.ConsensusHopping", num_particles=8),
                    "cbo": _module("lit_methods.optim.CBO", num_particles=8, particle_batch_size=None),
                    "langevin": _module("lit_methods.black_box.langevin.AnnealedLangevin", lr=1e-3),
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
    "lit_methods.vi.MultVAE": ModuleCase(
        config={
            "model": _module("lit_methods.vi.MultVAE", hidden_dims=[8], latent_dim=4, total_anneal_steps=10),
            "data": _MOVIES,
        },
        make=lambda: MultVAE(6, hidden_dims=(8,), latent_dim=4),
        forward_inputs=_history,
        bad=[
            (partial(MultVAE, **({"num_items": 6} | arguments)), message)
            for arguments, message in [*_AUTOENCODER_ARGUMENTS, ({"anneal_cap": -0.1}, "anneal_cap must be")]
        ],
        prepare=write_u_data,
    ),
    "lit_methods.vi.MultDAE": ModuleCase(
        config={"model": _module("lit_methods.vi.MultDAE", latent_dim=4), "data": _MOVIES},
        make=lambda: MultDAE(6, latent_dim=4),
        forward_inputs=_history,
        bad=[
            (partial(MultDAE, **({"num_items": 6} | arguments)), message)
            for arguments, message in [*_AUTOENCODER_ARGUMENTS, ({"l2_penalty": -0.1}, "l2_penalty must be")]
        ],
        prepare=write_u_data,
    ),
    "lit_methods.supervised.SSOModule": ModuleCase(
        config={
            "model": _module(
                "lit_methods.supervised.SSOModule",
                network=_module("lit_methods.nets.MLP", in_features=64, hidden_features=[16], out_features=10),
                num_classes=10,
                optimizer=_module("lit_methods.optim.SSO", lr=None, loss="ce", rule="armijo", inner_steps=3),
                lr_scheduler=_module("torch.optim.lr_scheduler.StepLR", step_size=1),
            ),
            "data": _module("lit_methods.datamodules.DigitsDataModule", batch_size=32),
        },
        make=lambda: SSOModule(MLP(64, [16], 10), num_classes=10),
        forward_inputs=lambda: (torch.ones(2, 1, 8, 8),),
        bad=[(lambda: SSOModule(MLP(4, [], 1), num_classes=1), "num_classes must be")],
    ),
    "lit_methods.online.OnlineImitation": ModuleCase(
        config={
            "model": _module(
                "lit_methods.online.OnlineImitation",
                policy=_module("lit_methods.nets.MLP", in_features=4, hidden_features=[8], out_features=1),
                optimizer=_module("lit_methods.optim.SSO", lr=0.5, inner="adam", inner_steps=3, rule="adagrad"),
            ),
            "data": _module(
                "lit_methods.datamodules.ImitationDataModule",
                env="InvertedPendulum-v5",
                expert=_module("lit_methods.nets.LinearFeedback", gain=_PENDULUM_EXPERT),
                samples_per_round=12,
                eval_episodes=1,
                batch_size=3,
            ),
        },
        make=lambda: OnlineImitation(MLP(4, [8], 1)),
        forward_inputs=lambda: (torch.ones(2, 4),),
        bad=[],
    ),
    "lit_methods.rl.OnPolicyMDPO": ModuleCase(
        config={
            "model": _module(
                "lit_methods.rl.OnPolicyMDPO",
                policy=_module(_NETWORKS + "GaussianPolicy", action_size=1, **_PENDULUM),
                critic=_module(_NETWORKS + "ValueNetwork", **_PENDULUM),
                observation_shape=3,
                critic_batch_size=8,
                optimizer=_module("lit_methods.optim.MDPO", lr=1e-3, inner_steps=3),
                lr_scheduler=_module("torch.optim.lr_scheduler.StepLR", step_size=2),
            ),
            "data": _module(
                "lit_methods.datamodules.RolloutDataModule",
                env="Pendulum-v1",
                num_envs=2,
                rollout_steps=130,
                iterations_per_epoch=4,
                num_eval_episodes=1,
            ),
        },
        make=_on_policy,
        forward_inputs=lambda: (torch.ones(2, 3),),
        bad=[
            (lambda: _on_policy(gamma=1.5), "gamma must be"),
            (lambda: _on_policy(gae_lambda=-0.1), "gae_lambda must be"),
            (lambda: _on_policy(critic_epochs=0), "critic_epochs must be"),
            (lambda: _on_policy(critic_batch_size=0), "critic_batch_size must be"),
            (lambda: _on_policy(total_iterations=0), "total_iterations must be"),
            (lambda: _on_policy(value_clip=0.0), "value_clip must be"),
            (lambda: _on_policy(step_size_schedule="cosine"), "step_size_schedule must be"),
        ],
    ),
    "lit_methods.rl.OffPolicyMDPO": ModuleCase(
        config={
            "model": _module(
                "lit_methods.rl.OffPolicyMDPO",
                actor=_module(_NETWORKS + "TanhGaussianActor", action_size=1, low=-2.0, high=2.0, **_PENDULUM),
                critics=_module(_NETWORKS + "TwinCritic", action_size=1, **_PENDULUM),
                value=_module(_NETWORKS + "ValueNetwork", **_PENDULUM),
                optimizer=_module(
                    "lit_methods.optim.MDPO", lr=1e-3, inner_steps=1, anchor="parameters", anchor_interval=2
                ),
            ),
            "data": _module(
                "lit_methods.datamodules.ReplayDataModule",
                env="Pendulum-v1",
                batch_size=8,
                capacity=30,
                learning_starts=25,
                updates_per_epoch=4,
                steps_per_update=2,
                save_buffer=True,
                num_eval_episodes=1,
            ),
        },
        make=_off_policy,
        forward_inputs=lambda: (torch.ones(2, 3),),
        bad=[
            (lambda: _off_policy(gamma=1.5), "gamma must be"),
            (lambda: _off_policy(tau=0.0), "tau must be"),
            (lambda: _off_policy(tsallis_q=2.5), "tsallis_q must be"),
            (lambda: _off_policy(entropy_coef=-1.0), "entropy_coef must be"),
            (lambda: _off_policy(action_reg=-1.0), "action_reg must be"),
            (lambda: _off_policy(policy_q="q3"), "policy_q must be"),
            (lambda: _off_policy(exploration="none"), "exploration must be"),
            (lambda: TanhGaussianActor(3, 1, low=1.0, high=1.0), "low and high must be"),
        ],
    ),
    "lit_methods.llm.NashMP": ModuleCase(
        config={
            "model": _module(
                "lit_methods.llm.NashMP",
                model=_TINY_LLAMA,
                tokenizer=_WORDS,
                judge=_module(
                    "lit_methods.llm.FunctionJudge", function="lit_methods.llm.word_game.word_game_preference"
                ),
                max_new_tokens=4,
                warmup_steps=2,
                optimizer=_ADAM,
            ),
            "data": _module("lit_methods.datamodules.WordGameDataModule", num_rows=64, val_size=8, batch_size=4),
        },
        make=_nash_mp,
        forward_inputs=tuple,
        bad=[
            (lambda: _nash_mp(beta=0.0), "beta must be"),
            (lambda: _nash_mp(eta=-1.0), "eta must be"),
            (lambda: _nash_mp(samples_per_prompt=1), "samples_per_prompt must be"),
        ],
        not_applicable=_NO_FORWARD,
    ),
    "lit_methods.llm.SupervisedFineTuning": ModuleCase(
        config={
            "model": _module(
                "lit_methods.llm.SupervisedFineTuning",
                model=_TINY_LLAMA,
                tokenizer=_WORDS,
                max_new_tokens=4,
                optimizer=_ADAM,
            ),
            "data": _module("lit_methods.datamodules.WordGameDataModule", num_rows=64, val_size=8, batch_size=4),
        },
        make=lambda: SupervisedFineTuning(_TINY_LLAMA, _WORDS),
        forward_inputs=tuple,
        bad=[(lambda: SupervisedFineTuning(_TINY_LLAMA), "tokenizer must be")],
        not_applicable=_NO_FORWARD,
    ),
    "lit_methods.games.PreferenceGame": ModuleCase(
        config={"model": _module("lit_methods.games.PreferenceGame", preferences=_ROCK_PAPER_SCISSORS)},
        make=lambda: PreferenceGame(_ROCK_PAPER_SCISSORS),
        forward_inputs=tuple,
        bad=[(lambda: PreferenceGame(_ROCK_PAPER_SCISSORS, beta=0.0), "beta=0.0 must be")],
        not_applicable={
            "check_compiles": "It has no forward.",
            "check_runs_through_the_cli": "A game has nothing to validate or test; its recipe runs fit.",
            "check_resumes_bit_exactly_in_a_new_process": (
                "Without an optimizer there are no steps to count; tests/unit/games resumes it from its checkpoint."
            ),
            "check_checkpoint_rebuilds_the_module": "The same; tests/unit/games does it.",
            "check_ranks_stay_identical_under_ddp": "It has no trained parameters, which DDP requires.",
            "check_runs_finite_in_mixed_bfloat16": "It has no parameters; its iterates are float64 by design.",
            "check_logs_without_warnings": "Without optimizer steps max_steps never ends the run.",
        },
    ),
    "lit_methods.games.MatrixGame": ModuleCase(
        config={"model": _module("lit_methods.games.MatrixGame", payoff=[[1.0, 0.5], [0.0, 1.0]])},
        make=lambda: MatrixGame([[1.0, 0.5], [0.0, 1.0]]),
        forward_inputs=tuple,
        bad=[
            (lambda: MatrixGame([[]]), "payoff must be"),
            (lambda: MatrixGame([[1.0]], rounds=0), "rounds must be"),
            (lambda: MatrixGame([[1.0]], x=[1.0, 2.0]), "x must have 1 entries"),
            (lambda: MatrixGame([[1.0]], mixed=True, y=[0.5]), "y must be a probability vector"),
        ],
        not_applicable={
            "check_runs_through_the_cli": "A game has nothing to validate or test; its recipes run fit.",
        },
    ),
    "lit_methods.games.RingGAN": ModuleCase(
        config={
            "model": _module(
                "lit_methods.games.RingGAN",
                hidden_features=[8],
                batch_size=16,
                steps_per_epoch=8,
                optimizer=_module("lit_methods.optim.ExtraAdam", lr=1e-3),
            )
        },
        make=lambda: RingGAN(hidden_features=(8,)),
        forward_inputs=lambda: (torch.ones(2, 16),),
        bad=[
            (lambda: RingGAN(modes=0), "modes must be"),
            (lambda: RingGAN(latent_dim=0), "latent_dim must be"),
            (lambda: RingGAN(batch_size=0), "batch_size must be"),
            (lambda: RingGAN(steps_per_epoch=0), "steps_per_epoch must be"),
            (lambda: RingGAN(std=0.0), "std must be"),
        ],
    ),
    "lit_methods.llm.SequenceClassification": ModuleCase(
        config={
            "model": _module(
                "lit_methods.llm.SequenceClassification",
                model=_TINY_BERT,
                metrics=["accuracy", "f1", "matthews"],
                warmup=0.1,
                optimizer=_module("lit_methods.optim.MFAC", lr=1e-2, num_grads=4, damping=1e-3),
            ),
            "data": _module(
                "lit_methods.datamodules.GLUEDataModule", task="rte", tokenizer="tokenizer", data_dir=".", batch_size=4
            ),
        },
        make=lambda: SequenceClassification(_TINY_BERT),
        forward_inputs=lambda: (torch.arange(8).view(2, 4), torch.ones(2, 4).long(), torch.zeros(2, 4).long()),
        bad=[
            (lambda: SequenceClassification(_TINY_BERT, num_labels=1), "num_labels must be"),
            (lambda: SequenceClassification(_TINY_BERT, warmup=1.0), "warmup must be"),
            (lambda: SequenceClassification(_TINY_BERT, metrics=["pearson"]), "metrics must name"),
            (lambda: SequenceClassification({"hidden_size": 8}), "model has no model_type"),
        ],
        prepare=write_glue,
    ),
    "lit_methods.online.OnlineLearning": ModuleCase(
        config={
            "model": _module(
                "lit_methods.online.OnlineLearning",
                dim=5,
                loss="logistic",
                optimizer=_module(
                    "lit_methods.optim.OptimisticOMD",
                    lr=2.0,
                    constraint=_module("lit_methods.optim.Ball", radius=1.0),
                ),
            ),
            "data": _module("lit_methods.datamodules.SEADataModule", kind="drift", loss="logistic", dim=5, rounds=8),
        },
        make=lambda: OnlineLearning(5, "logistic"),
        forward_inputs=lambda: (torch.ones(2, 5),),
        bad=[
            (lambda: OnlineLearning(0), "dim must be"),
            (lambda: OnlineLearning(2, "log"), "loss must be"),  # type: ignore[arg-type]
            (lambda: OnlineLearning(2, radius=0.0), "radius must be"),
        ],
    ),
    "lit_methods.supervised.SupervisedModule": ModuleCase(
        config={
            "model": _module(
                "lit_methods.supervised.SupervisedModule",
                network=_module("lit_methods.nets.MLP", in_features=64, hidden_features=[16], out_features=10),
                num_classes=10,
                optimizer=_module("lit_methods.optim.MFAC", lr=1e-2, num_grads=4, damping=1e-3, momentum=0.9),
                lr_scheduler=_module("torch.optim.lr_scheduler.StepLR", step_size=1),
            ),
            "data": _module("lit_methods.datamodules.DigitsDataModule", batch_size=32),
        },
        make=lambda: SupervisedModule(MLP(64, [16], 10), num_classes=10),
        forward_inputs=lambda: (torch.ones(2, 1, 8, 8),),
        bad=[(lambda: SupervisedModule(MLP(4, [], 1), num_classes=1), "num_classes must be")],
    ),
    "lit_methods.transport.PointRegistration": ModuleCase(
        config={
            "model": _module("lit_methods.transport.PointRegistration", optimizer=_ADAM),
            "data": _module("lit_methods.datamodules.DigitPointsDataModule", num_points=6, batch_size=4, test_size=20),
        },
        make=lambda: PointRegistration(),
        forward_inputs=lambda: (torch.ones(2, 5, 2),),
        bad=[
            (lambda: PointRegistration(0), "dimensions must be"),
            (lambda: PointRegistration(eta=0.0), "eta must be"),
        ],
    ),
    "lit_methods.transport.OTGenerator": ModuleCase(
        config={
            "model": _module(
                "lit_methods.transport.OTGenerator",
                network=_module("lit_methods.nets.MLP", in_features=3, hidden_features=[8], out_features=64),
                latent_features=3,
            ),
            "data": _module("lit_methods.datamodules.DigitsDataModule", batch_size=16, test_size=20),
        },
        make=lambda: OTGenerator(MLP(3, [8], 64), latent_features=3),
        forward_inputs=lambda: (torch.ones(2, 3),),
        bad=[
            (lambda: OTGenerator(MLP(3, [8], 64), 0), "latent_features must be"),
            (lambda: OTGenerator(MLP(3, [8], 64), 3, eta=-1.0), "eta must be"),
        ],
    ),
    "lit_methods.sensing.SymmetricSensing": ModuleCase(
        config={
            "model": _module("lit_methods.sensing.SymmetricSensing", size=6, factor_rank=3, init_scales=[0.5, 0.2]),
            "data": _module(
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
            "model": _module(
                "lit_methods.sensing.AsymmetricSensing", rows=6, columns=4, factor_rank=3, init_scales=[0.5, 0.2]
            ),
            "data": _module(
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

_LANGUAGE_MODELS_ONLY = {
    "check_attaches_to_an_unrelated_module": "It acts on language-model modules only, as its docstring says.",
    "check_state_survives_a_checkpoint": "The same; tests/unit/callbacks/test_llm_callbacks.py covers its state.",
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
    "lit_methods.callbacks.EmpiricalFisherMonitor": CallbackCase(
        lambda: EmpiricalFisherMonitor(num_grads=4, batch_size=6),
        bad=[
            (lambda: EmpiricalFisherMonitor(num_grads=0), "num_grads must be"),
            (lambda: EmpiricalFisherMonitor(batch_size=0), "batch_size must be"),
            (lambda: EmpiricalFisherMonitor(num_eigenvalues=0), "num_eigenvalues must be"),
            (lambda: EmpiricalFisherMonitor(every_n_epochs=0), "every_n_epochs must be"),
            (lambda: EmpiricalFisherMonitor(seed=-1), "seed must be"),
        ],
    ),
    "lit_methods.callbacks.ConvergenceRates": CallbackCase(
        lambda: ConvergenceRates(["loss", "val_loss"]),
        bad=[
            (lambda: ConvergenceRates([]), "metrics must name"),
            (lambda: ConvergenceRates(["loss"], from_step=0), "from_step must be"),
            (lambda: ConvergenceRates(["loss"], floor=0.0), "floor must be"),
        ],
    ),
    "lit_methods.callbacks.TransportTable": CallbackCase(
        lambda: TransportTable(eta=50.0, assignment_size=10, image_size=4),
        bad=[
            (lambda: TransportTable(eta=0.0), "eta must be"),
            (lambda: TransportTable(assignment_size=0), "assignment_size must be"),
            (lambda: TransportTable(image_size=1), "image_size must be"),
            (lambda: TransportTable(tol=0.0), "tol must be"),
            (lambda: TransportTable(max_sweeps=0), "max_sweeps must be"),
            (lambda: TransportTable(seed=-1), "seed must be"),
        ],
    ),
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
    "lit_methods.callbacks.ExactResume": CallbackCase(ExactResume, bad=[]),
    "lit_methods.callbacks.ConvergenceCurves": CallbackCase(
        lambda: ConvergenceCurves(["kl"]),
        bad=[
            (lambda: ConvergenceCurves([]), "groups must name"),
            (lambda: ConvergenceCurves(["kl"], name="a/b"), "name must be"),
        ],
    ),
    "lit_methods.callbacks.ExportHF": CallbackCase(ExportHF, bad=[], not_applicable=_LANGUAGE_MODELS_ONLY),
    "lit_methods.callbacks.SFTWarmup": CallbackCase(
        SFTWarmup, bad=[(lambda: SFTWarmup(steps=0), "steps must be")], not_applicable=_LANGUAGE_MODELS_ONLY
    ),
    "lit_methods.callbacks.SampleTable": CallbackCase(
        SampleTable,
        bad=[(lambda: SampleTable(num_prompts=0), "num_prompts and max_characters must be")],
        not_applicable=_LANGUAGE_MODELS_ONLY,
    ),
    "lit_methods.callbacks.WinRate": CallbackCase(
        WinRate, bad=[(lambda: WinRate(confidence=2.0), "confidence must be")], not_applicable=_LANGUAGE_MODELS_ONLY
    ),
    "lit_methods.callbacks.LearningCurves": CallbackCase(
        LearningCurves,
        bad=[
            (lambda: LearningCurves(metrics=[]), "metrics must name"),
            (lambda: LearningCurves(name="a/b"), "name must be"),
        ],
    ),
    "lit_methods.callbacks.MFACPruning": CallbackCase(
        lambda: MFACPruning(schedule={0: 0.25, 1: 0.5}, num_grads=4, batch_size=6, recomputations=2),
        bad=[
            (MFACPruning, "target_sparsity or schedule"),
            (lambda: MFACPruning(1.0), "target_sparsity must"),
            (lambda: MFACPruning(schedule={1: 0.5, 2: 0.4}), "schedule must not decrease"),
            (lambda: MFACPruning(0.5, num_grads=0), "num_grads must be"),
            (lambda: MFACPruning(0.5, batch_size=0), "batch_size must be"),
            (lambda: MFACPruning(0.5, damping=0.0), "damping must be"),
            (lambda: MFACPruning(0.5, block_size=0), "block_size must be"),
            (lambda: MFACPruning(0.5, recomputations=0), "recomputations must be"),
            (lambda: MFACPruning(0.5, scope="row"), "scope must be"),  # type: ignore[arg-type]
            (lambda: MFACPruning(0.5, seed=-1), "seed must be"),
        ],
    ),
    "lit_methods.callbacks.PolicyEvaluation": CallbackCase(
        PolicyEvaluation,
        bad=[
            (lambda: PolicyEvaluation(confidence=1.0), "confidence must be"),
            (lambda: PolicyEvaluation(num_resamples=0), "num_resamples must be"),
        ],
        not_applicable={
            "check_state_survives_a_checkpoint": (
                "An unrelated module has no episodes to keep; tests/unit/callbacks/test_policy_callbacks.py does it."
            )
        },
    ),
    "lit_methods.callbacks.PolicyFrames": CallbackCase(
        lambda: PolicyFrames("Pendulum-v1"),
        bad=[(lambda: PolicyFrames("Pendulum-v1", num_frames=0), "num_frames must be")],
        not_applicable={
            "check_attaches_to_an_unrelated_module": "It acts on modules with an act method, as its docstring says.",
            "check_state_survives_a_checkpoint": "It keeps nothing between steps: it works after training has ended.",
        },
    ),
    "lit_methods.callbacks.PruningCurve": CallbackCase(
        lambda: PruningCurve("test_loss", [0.5], [1], num_grads=4, batch_size=6),
        bad=[(lambda: PruningCurve("test_loss", [], [1]), "sparsities and recomputations must not be empty")],
        not_applicable={
            "check_state_survives_a_checkpoint": "It keeps nothing between steps: it works after training has ended."
        },
    ),
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
    "lit_methods.callbacks.ResultTable": CallbackCase(
        ResultTable,
        bad=[(lambda: ResultTable(stage="fit"), "stage must be")],
        not_applicable={
            "check_state_survives_a_checkpoint": "It keeps nothing between steps: its results come after fit has ended."
        },
    ),
}

_LOADER_ARGUMENTS: list[tuple[Arguments, str]] = [
    ({"batch_size": 0}, "batch_size=0: must be an integer >= 1"),
    ({"num_workers": -1}, "num_workers=-1: must be"),
    ({"seed": -1}, "seed=-1: must be"),
    ({"val_size": -1}, "val_size=-1: must be"),
]


def _mnist(datamodule: type[LightningDataModule], folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_mnist(folder)
    return datamodule(**({"data_dir": str(folder), "batch_size": 4, "val_size": 8} | arguments))


def _cifar(datamodule: type[CIFAR10DataModule], folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_cifar(folder, datamodule)
    return datamodule(**({"data_dir": str(folder), "batch_size": 4, "val_size": 8} | arguments))


def _glue(folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_glue(folder)
    tokenizer = str(folder / "tokenizer")
    return GLUEDataModule(
        **({"task": "rte", "tokenizer": tokenizer, "data_dir": str(folder), "batch_size": 4} | arguments)
    )


_CIFAR_ARGUMENTS: list[tuple[Arguments, str]] = [
    *_LOADER_ARGUMENTS,
    ({"mean": (0.5,)}, "mean=.*three numbers"),
    ({"std": (1.0, 0.0, 1.0)}, "std=.*three numbers > 0"),
]


def _libsvm(folder: Path, **arguments: Any) -> LightningDataModule:
    file = folder / "data"
    if not file.exists():
        file.write_text("".join(f"{1 - i % 2 * 2} {i % 5 + 1}:{i / 7:.3f} {i % 3 + 7}:1\n" for i in range(40)))
    return LibSVMDataModule(**({"train_file": str(file), "batch_size": 4, "val_size": 6, "test_size": 5} | arguments))


def _imitation(folder: Path, **arguments: Any) -> LightningDataModule:
    given = {"env": "InvertedPendulum-v5", "expert": LinearFeedback(_PENDULUM_EXPERT), "batch_size": 4}
    return ImitationDataModule(**(given | {"samples_per_round": 40, "eval_episodes": 1} | arguments))


def _tensors(folder: Path, **arguments: Any) -> LightningDataModule:
    rows = SupervisedBatch(torch.arange(40.0)[:, None], torch.arange(40) % 3)
    return TensorDataModule(train=rows, val=rows, test=rows, **({"batch_size": 4} | arguments))


def _prompts(folder: Path, **arguments: Any) -> LightningDataModule:
    rows = [f"prompt {i}" for i in range(40)]
    return PromptDataModule(rows, **({"batch_size": 4, "val_size": 6} | arguments))


def _word_game(folder: Path, **arguments: Any) -> LightningDataModule:
    return WordGameDataModule(**({"num_rows": 40, "batch_size": 4, "val_size": 6} | arguments))


class _PushRight:
    """A policy that needs no training."""

    device = torch.device("cpu")

    def act(self, observations: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        return torch.ones(len(observations), 1), torch.zeros(len(observations))


def _with_agent(datamodule: Callable[..., LightningDataModule], **small: Any) -> Callable[..., LightningDataModule]:
    def make(folder: Path, **arguments: Any) -> LightningDataModule:
        data = datamodule(**({"env": "Pendulum-v1", "num_eval_episodes": 2} | small | arguments))
        data.trainer = SimpleNamespace(lightning_module=_PushRight(), global_rank=0, world_size=1)
        return data

    return make


_STREAM = {
    "check_epochs_differ": "A stream of experience has no order; the resume check sees that it goes on.",
    "check_setup_only_reads_and_may_run_twice": "The same: a second look at the stream sees what comes next.",
}


def _covertype(folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_covertype(folder)
    arguments.pop("seed", None)  # nothing is drawn
    return CovertypeDataModule(**({"data_dir": folder, "download": False} | arguments))


def _record(path: Path) -> None:
    g = np.random.default_rng(0)
    save_transitions_hdf5(
        path,
        {
            "observations": g.normal(size=(60, 3)),
            "actions": g.uniform(-1, 1, (60, 1)),
            "rewards": g.normal(size=60),
            "terminals": np.zeros(60, bool),
            "timeouts": np.arange(60) % 20 == 19,
            "next_observations": g.normal(size=(60, 3)),
        },
    )


def _d4rl(folder: Path, **arguments: Any) -> LightningDataModule:
    path = folder / "recording.hdf5"
    if not path.exists():
        _record(path)
    small = {"dataset": path, "batch_size": 4, "steps_per_epoch": 5, "eval_env": "Pendulum-v1", "num_eval_episodes": 1}
    data = D4RLDataModule(**(small | arguments))
    data.trainer = SimpleNamespace(lightning_module=_PushRight(), global_rank=0, world_size=1)
    return data


_FEW_USERS = {"num_heldout_users": 10, "min_user_interactions": 5, "batch_size": 8}


def _interactions(
    datamodule: Callable[..., LightningDataModule], write: Callable[[Path], None], folder: Path, **arguments: Any
) -> LightningDataModule:
    if not any(folder.iterdir()):
        write(folder)
    return datamodule(**({"data_dir": str(folder), "cache_dir": str(folder / "cache"), **_FEW_USERS} | arguments))


def _own_interactions(folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_u_data(folder)
        (folder / "own.tsv").write_text("user_id\titem_id\trating\ttime\n" + (folder / "u.data").read_text())
    return InteractionsDataModule(str(folder / "own.tsv"), **({"delimiter": "\t", **_FEW_USERS} | arguments))


_INTERACTIONS_ARGUMENTS: list[tuple[Arguments, str]] = [
    *_LOADER_ARGUMENTS[:3],
    ({"eval_batch_size": 0}, "eval_batch_size=0: must be"),
    ({"min_user_interactions": 0}, "min_user_interactions=0: must be"),
    ({"min_item_interactions": -1}, "min_item_interactions=-1: must be"),
    ({"num_heldout_users": 0}, "num_heldout_users=0: must be"),
    ({"target_fraction": 1.0}, "target_fraction=1.0: must be"),
    ({"split_seed": -1}, "split_seed=-1: must be"),
]

DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.InteractionsDataModule": DataModuleCase(_own_interactions, bad=_INTERACTIONS_ARGUMENTS),
    "lit_methods.datamodules.MovieLensDataModule": DataModuleCase(
        partial(_interactions, MovieLensDataModule, write_u_data, version="100k"),
        bad=[*_INTERACTIONS_ARGUMENTS, ({"version": "2m"}, "version='2m': must be one of 100k")],
    ),
    "lit_methods.datamodules.NetflixPrizeDataModule": DataModuleCase(
        partial(_interactions, NetflixPrizeDataModule, write_netflix), bad=_INTERACTIONS_ARGUMENTS
    ),
    "lit_methods.datamodules.MSDTasteProfileDataModule": DataModuleCase(
        partial(_interactions, MSDTasteProfileDataModule, write_msd, min_item_interactions=2),
        bad=_INTERACTIONS_ARGUMENTS,
    ),
    "lit_methods.datamodules.BreastCancerDataModule": DataModuleCase(
        lambda folder, **arguments: BreastCancerDataModule(**arguments),
        bad=[*_LOADER_ARGUMENTS, ({"test_size": 569}, "test_size=569: must be")],
    ),
    "lit_methods.datamodules.LibSVMDataModule": DataModuleCase(
        _libsvm,
        bad=[
            *_LOADER_ARGUMENTS,
            ({"task": "ranking"}, "task='ranking': must be"),
            ({"num_features": 0}, "num_features=0: must be"),
            ({"test_size": -1}, "test_size=-1: must be"),
        ],
    ),
    "lit_methods.datamodules.MatrixFactorizationDataModule": DataModuleCase(
        lambda folder, **arguments: MatrixFactorizationDataModule(**({"batch_size": 4} | arguments)),
        bad=[
            *_LOADER_ARGUMENTS[:3],
            ({"num_samples": 0}, "num_samples=0: must be"),
            ({"in_features": 0}, "in_features=0: must be"),
            ({"out_features": 0}, "out_features=0: must be"),
            ({"dtype": "int8"}, "dtype='int8': must be"),
        ],
    ),
    "lit_methods.datamodules.ImitationDataModule": DataModuleCase(
        _imitation,
        bad=[
            *_LOADER_ARGUMENTS[:3],
            ({"samples_per_round": 0}, "samples_per_round=0: must be"),
            ({"num_envs": 0}, "num_envs=0: must be"),
            ({"beta": 1.5}, "beta=1.5: must be"),
            ({"beta_decay": -0.5}, "beta_decay=-0.5: must be"),
            ({"actions": "round"}, "actions='round': must be"),
            ({"eval_episodes": 0}, "eval_episodes=0: must be"),
        ],
    ),
    "lit_methods.datamodules.D4RLDataModule": DataModuleCase(
        _d4rl,
        bad=[
            ({"dataset": "hopper"}, "dataset='hopper': must be"),
            ({"batch_size": 0}, "batch_size=0: must be"),
            ({"steps_per_epoch": 0}, "steps_per_epoch=0: must be"),
            ({"max_episode_steps": 0}, "max_episode_steps=0: must be"),
            ({"format": "csv"}, "format='csv': must be"),
            ({"kind": "frames"}, "kind='frames': must be"),
            ({"next_observations": "none"}, "next_observations='none': must be"),
            ({"reward_scale": "large"}, "reward_scale='large': must be"),
            ({"seed": -1}, "seed=-1: must be"),
        ],
        not_applicable={"check_epochs_differ": _STREAM["check_epochs_differ"]},
    ),
    "lit_methods.datamodules.RolloutDataModule": DataModuleCase(
        _with_agent(RolloutDataModule, num_envs=2, rollout_steps=60, iterations_per_epoch=5),
        bad=[
            ({"num_envs": 0}, "num_envs=0: must be"),
            ({"rollout_steps": 0}, "rollout_steps=0: must be"),
            ({"iterations_per_epoch": 0}, "iterations_per_epoch=0: must be"),
            ({"num_eval_episodes": 0}, "num_eval_episodes=0: must be"),
            ({"vectorization": "threads"}, "vectorization='threads': must be"),
            ({"seed": -1}, "seed=-1: must be"),
        ],
        not_applicable=_STREAM,
    ),
    "lit_methods.datamodules.ReplayDataModule": DataModuleCase(
        _with_agent(
            ReplayDataModule,
            batch_size=4,
            capacity=40,
            learning_starts=30,
            updates_per_epoch=5,
            steps_per_update=50,
            save_buffer=True,
        ),
        bad=[
            ({"num_envs": 0}, "num_envs=0: must be"),
            ({"capacity": 0}, "capacity=0: must be"),
            ({"batch_size": 0}, "batch_size=0: must be"),
            ({"learning_starts": 0}, "learning_starts=0: must be"),
            ({"steps_per_update": 0}, "steps_per_update=0: must be"),
            ({"updates_per_step": 0}, "updates_per_step=0: must be"),
            ({"updates_per_epoch": 0}, "updates_per_epoch=0: must be"),
            ({"seed": -1}, "seed=-1: must be"),
        ],
        not_applicable=_STREAM,
    ),
    "lit_methods.datamodules.PromptDataModule": DataModuleCase(_prompts, bad=_LOADER_ARGUMENTS),
    "lit_methods.datamodules.WordGameDataModule": DataModuleCase(_word_game, bad=_LOADER_ARGUMENTS),
    "lit_methods.datamodules.CIFAR10DataModule": DataModuleCase(
        partial(_cifar, CIFAR10DataModule), bad=_CIFAR_ARGUMENTS
    ),
    "lit_methods.datamodules.CIFAR100DataModule": DataModuleCase(
        partial(_cifar, CIFAR100DataModule), bad=[*_CIFAR_ARGUMENTS, ({"label": "medium"}, "label='medium'")]
    ),
    "lit_methods.datamodules.TensorDataModule": DataModuleCase(_tensors, bad=_LOADER_ARGUMENTS[:3]),
    "lit_methods.datamodules.DigitsDataModule": DataModuleCase(
        lambda folder, **arguments: DigitsDataModule(**arguments),
        bad=[*_LOADER_ARGUMENTS, ({"test_size": 1797}, "test_size=1797: must be")],
    ),
    "lit_methods.datamodules.FashionMNISTDataModule": DataModuleCase(
        partial(_mnist, FashionMNISTDataModule), bad=_LOADER_ARGUMENTS
    ),
    "lit_methods.datamodules.DigitPointsDataModule": DataModuleCase(
        lambda folder, **arguments: DigitPointsDataModule(**({"num_points": 5} | arguments)),
        bad=[
            *_LOADER_ARGUMENTS,
            ({"num_points": 0}, "num_points=0: must be"),
            ({"angle": float("nan")}, "angle=nan: must be"),
            ({"shift": (0.0, float("inf"))}, "shift=.*: must be"),
            ({"test_size": 1797}, "test_size=1797: must be"),
        ],
    ),
    "lit_methods.datamodules.SensingDataModule": DataModuleCase(
        lambda folder, **arguments: SensingDataModule(
            **({"rows": 5, "rank": 2, "num_measurements": 20, "batch_size": 4} | arguments)
        ),
        bad=[
            *_LOADER_ARGUMENTS[:3],
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
    "lit_methods.datamodules.SEADataModule": DataModuleCase(
        lambda folder, **arguments: SEADataModule(**({"dim": 4, "rounds": 10} | arguments)),
        bad=[
            *_LOADER_ARGUMENTS[1:3],
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
        bad=[_LOADER_ARGUMENTS[1], ({"samples_per_round": 0}, "samples_per_round=0: must be")],
        not_applicable={
            "check_batches_are_a_function_of_the_seed": "Its rounds are the file's rows, in order; no seed matters.",
            "check_epochs_differ": "The same rows again.",
        },
    ),
    "lit_methods.datamodules.DriftingDigitsDataModule": DataModuleCase(
        lambda folder, **arguments: DriftingDigitsDataModule(**({"rounds": 10} | arguments)),
        bad=[
            *_LOADER_ARGUMENTS[1:3],
            ({"rounds": 0}, "rounds=0: must be"),
            ({"max_angle": 181.0}, "max_angle=181.0: must be"),
            ({"period": 1}, "period=1: must be"),
            ({"samples_per_round": 0}, "samples_per_round=0: must be"),
        ],
    ),
    "lit_methods.datamodules.GLUEDataModule": DataModuleCase(
        _glue,
        bad=[
            *_LOADER_ARGUMENTS[:3],
            ({"task": "squad"}, "task='squad': must be one of cola"),
            ({"max_length": 0}, "max_length=0: must be"),
        ],
    ),
    "lit_methods.datamodules.MNISTDataModule": DataModuleCase(partial(_mnist, MNISTDataModule), bad=_LOADER_ARGUMENTS),
}

_TINY = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2"]

_TINY_SENSING = ["--trainer.max_epochs=1", "--trainer.val_check_interval=4", "--data.steps_per_epoch=8"]

_TINY_ROLLOUTS = [
    "--trainer.max_epochs=1", "--data.iterations_per_epoch=1", "--data.rollout_steps=20", "--data.num_eval_episodes=1"
]  # fmt: skip


_TINY_MOVIES = [*_TINY, "--data.data_dir=.", "--data.num_heldout_users=10", "--data.batch_size=8"]

_TINY_LANDSCAPE = ["--model.num_runs=2", "--model.steps_per_epoch=3", "--trainer.max_epochs=1"]


RECIPES: dict[str, RecipeCase] = {
    "cbo/ackley": RecipeCase(_TINY_LANDSCAPE),
    "cbo/digits": RecipeCase(_TINY),
    "cbo/digits_hopping": RecipeCase(_TINY),
    "cbo/fashion_mnist": RecipeCase([*_TINY, "--data.data_dir=.", "--data.batch_size=8"], prepare=write_mnist),
    "cbo/illustrations": RecipeCase(_TINY_LANDSCAPE),
    "cbo/rastrigin": RecipeCase(_TINY_LANDSCAPE),
    "mult_vae/ml100k": RecipeCase(_TINY_MOVIES, prepare=write_u_data),
    "mult_vae/ml100k_dae": RecipeCase(_TINY_MOVIES, prepare=write_u_data),
    "mdpo/half_cheetah": RecipeCase(_TINY_ROLLOUTS),
    "mdpo/hopper": RecipeCase(_TINY_ROLLOUTS),
    "mdpo/inverted_pendulum": RecipeCase(_TINY_ROLLOUTS),
    "mdpo/pendulum": RecipeCase(
        [
            "--trainer.max_epochs=1",
            "--data.updates_per_epoch=3",
            "--data.learning_starts=10",
            "--data.num_eval_episodes=1",
            "--data.record_to=steps.hdf5",
        ]
    ),
    "mdpo/pendulum_offline": RecipeCase(
        ["--trainer.max_epochs=1", "--data.steps_per_epoch=3", "--data.num_eval_episodes=1"],
        prepare=lambda folder: _record(folder / "pendulum_replay.hdf5"),
    ),
    "nash_mp/matrix_games": RecipeCase(["--model.num_iterations=3"]),
    "nash_mp/smollm2_vader": RecipeCase(
        [
            "--trainer.max_steps=1",
            "--trainer.val_check_interval=1",
            "--trainer.accelerator=cpu",
            "--model.max_new_tokens=4",
            "--model.judge.init_args.score=tests.unit.llm.tiny.number_of_words",
        ],
        prepare=lambda folder: save_tiny_chat(folder / "smollm2"),
    ),
    "nash_mp/tiny_intransitive": RecipeCase(
        ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--data.num_rows=64", "--data.val_size=4"]
    ),
    "sso/digits": RecipeCase(_TINY),
    "sso/imitation": RecipeCase(["--trainer.max_epochs=2", "--data.samples_per_round=20", "--data.eval_episodes=1"]),
    "sso/logistic": RecipeCase(_TINY),
    "sso/matrix_factorization": RecipeCase(_TINY),
    "sinkhorn_newton_sparse/registration": RecipeCase(_TINY),
    "sinkhorn_newton_sparse/fashion_mnist": RecipeCase(
        [
            *_TINY,
            "--data.data_dir=.",
            "--data.val_size=8",
            "--data.batch_size=8",
            "--trainer.callbacks.assignment_size=20",
            "--trainer.callbacks.image_size=6",
            "--trainer.callbacks.eta=100",
        ],
        prepare=write_mnist,
    ),
    "sinkhorn_newton_sparse/tables": RecipeCase(
        [
            *_TINY,
            "--data.batch_size=16",
            "--trainer.callbacks.assignment_size=20",
            "--trainer.callbacks.image_size=6",
            "--trainer.callbacks.eta=100",
        ]
    ),
    "matrix_sensing/asymmetric": RecipeCase(_TINY_SENSING),
    "matrix_sensing/gaussian_one_step": RecipeCase([*_TINY_SENSING, "--data.num_measurements=50"]),
    "matrix_sensing/lora_digits": RecipeCase(["--trainer.max_epochs=4"]),
    "matrix_sensing/lora_digits_one_step": RecipeCase(["--trainer.max_epochs=4"]),
    "matrix_sensing/one_step": RecipeCase(_TINY_SENSING),
    "matrix_sensing/symmetric": RecipeCase(_TINY_SENSING),
    "matrix_sensing/symmetric_exact": RecipeCase(_TINY_SENSING),
    **{
        f"optimistic_omd/{name}": RecipeCase(["--data.rounds=20", "--trainer.val_check_interval=5"])
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
    "optimistic_omd/bilinear": RecipeCase(["--model.rounds=5"]),
    "optimistic_omd/rock_paper_scissors": RecipeCase(["--model.rounds=5"]),
    "optimistic_omd/ring_gan": RecipeCase(["--model.steps_per_epoch=3", "--trainer.max_epochs=1"]),
    "mfac/digits": RecipeCase(_TINY),
    "mfac/fashion_mnist": RecipeCase(
        [*_TINY, "--data.data_dir=.", "--data.val_size=8", "--data.batch_size=8"], prepare=write_mnist
    ),
    "mfac/prune_digits": RecipeCase(_TINY),
    "mfac/prune_fashion_mnist": RecipeCase(
        [*_TINY[1:], "--trainer.max_epochs=9", "--data.data_dir=.", "--data.val_size=8", "--data.batch_size=8"],
        prepare=write_mnist,
    ),
}
