"""Cases of the family: rl."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lit_methods.callbacks import (
    PolicyEvaluation,
    PolicyFrames,
)
from lit_methods.datamodules import (
    D4RLDataModule,
    ReplayDataModule,
    RolloutDataModule,
    save_transitions_hdf5,
)
from lit_methods.optim import (
    MDPO,
)
from lit_methods.rl import OffPolicyMDPO, OnPolicyMDPO
from lit_methods.rl.networks import GaussianPolicy, TanhGaussianActor, TwinCritic, ValueNetwork
from tests.contract.cases.kinds import CallbackCase, DataModuleCase, ModuleCase, OptimizerCase, RecipeCase, class_config

_PENDULUM = {"observation_size": 3, "hidden_features": [8]}

_NETWORKS = "lit_methods.rl.networks."


def _on_policy(**arguments: Any) -> OnPolicyMDPO:
    return OnPolicyMDPO(GaussianPolicy(3, 1, [8]), ValueNetwork(3, [8]), 3, **arguments)


def _off_policy(**arguments: Any) -> OffPolicyMDPO:
    return OffPolicyMDPO(TanhGaussianActor(3, 1, [8]), TwinCritic(3, 1, [8]), ValueNetwork(3, [8]), **arguments)


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


_TINY_ROLLOUTS = [
    "--trainer.max_epochs=2", "--data.iterations_per_epoch=2", "--data.rollout_steps=20", "--data.num_eval_episodes=1"
]  # fmt: skip

OPTIMIZERS: dict[str, OptimizerCase] = {
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
        host_syncs=True,
    ),
}


MODULES: dict[str, ModuleCase] = {
    "lit_methods.rl.OnPolicyMDPO": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.rl.OnPolicyMDPO",
                policy=class_config(_NETWORKS + "GaussianPolicy", action_size=1, **_PENDULUM),
                critic=class_config(_NETWORKS + "ValueNetwork", **_PENDULUM),
                observation_shape=3,
                critic_batch_size=8,
                optimizer=class_config("lit_methods.optim.MDPO", lr=1e-3, inner_steps=3),
                lr_scheduler=class_config("torch.optim.lr_scheduler.StepLR", step_size=2),
            ),
            "data": class_config(
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
            "model": class_config(
                "lit_methods.rl.OffPolicyMDPO",
                actor=class_config(_NETWORKS + "TanhGaussianActor", action_size=1, low=-2.0, high=2.0, **_PENDULUM),
                critics=class_config(_NETWORKS + "TwinCritic", action_size=1, **_PENDULUM),
                value=class_config(_NETWORKS + "ValueNetwork", **_PENDULUM),
                optimizer=class_config(
                    "lit_methods.optim.MDPO", lr=1e-3, inner_steps=1, anchor="parameters", anchor_interval=2
                ),
            ),
            "data": class_config(
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
}


DATAMODULES: dict[str, DataModuleCase] = {
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
}


CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.PolicyEvaluation": CallbackCase(
        PolicyEvaluation,
        bad=[
            (lambda: PolicyEvaluation(confidence=1.0), "confidence must be"),
            (lambda: PolicyEvaluation(num_resamples=0), "num_resamples must be"),
        ],
        not_applicable={
            "check_state_survives_a_checkpoint": (
                "An unrelated module has no episodes to keep; tests/unit/callbacks/rl/test_policy_callbacks.py does it."
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
}


RECIPES: dict[str, RecipeCase] = {
    "mdpo/half_cheetah": RecipeCase(_TINY_ROLLOUTS),
    "mdpo/hopper": RecipeCase(_TINY_ROLLOUTS),
    "mdpo/inverted_pendulum": RecipeCase(_TINY_ROLLOUTS),
    "mdpo/pendulum": RecipeCase(
        [
            "--trainer.max_epochs=2",
            "--data.updates_per_epoch=3",
            "--data.learning_starts=10",
            "--data.num_eval_episodes=1",
            "--data.record_to=steps.hdf5",
        ]
    ),
    "mdpo/pendulum_offline": RecipeCase(
        ["--trainer.max_epochs=2", "--data.steps_per_epoch=3", "--data.num_eval_episodes=1"],
        prepare=lambda folder: _record(folder / "pendulum_replay.hdf5"),
    ),
}
