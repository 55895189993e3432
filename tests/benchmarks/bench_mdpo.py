"""MDPO against stable-baselines3's PPO and SAC and sb3-contrib's TRPO, and the loader against a per-item one.

Run ``python -m tests.benchmarks.bench_mdpo [section ...]``; sections: on_policy, off_policy, loader. Peers are optional
(see requirements.txt). Speed is environment steps, or updates, per second of the process's CPU time on one thread,
training included and evaluation not: wall time means little on a shared machine. Every library plays by its defaults,
PPO and TRPO with VecNormalize as their users would, with 8 environments of 256 steps; seeds run in rotating order.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from lit_methods.datamodules import D4RLDataModule, ReplayDataModule, RolloutDataModule, save_transitions_hdf5
from lit_methods.datamodules.rl.environments import evaluate
from lit_methods.optim import MDPO
from lit_methods.rl import OffPolicyMDPO, OnPolicyMDPO
from lit_methods.rl.networks import GaussianPolicy, TanhGaussianActor, TwinCritic, ValueNetwork
from tests.benchmarks import harness

PACKAGES = ("lit-methods", "stable-baselines3", "sb3-contrib", "gymnasium", "mujoco")
ON_POLICY = {"InvertedPendulum-v5": (98_304, 3e-4), "Hopper-v5": (100_352, 1e-3), "HalfCheetah-v5": (100_352, 1e-3)}


def save(section: str, rows: list[harness.Row]) -> None:
    harness.save("mdpo", section, rows, PACKAGES)


def sizes(env: str) -> tuple[int, int]:
    spaces = gym.make(env)
    return spaces.observation_space.shape[0], spaces.action_space.shape[0]  # type: ignore[index]


def trainer(steps: int) -> L.Trainer:
    return L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip


def ours_on_policy(env: str, steps: int, seed: int, lr: float, inner_steps: int = 10) -> tuple[float, float]:
    """Mean return of the last 40 training episodes, and CPU seconds."""
    L.seed_everything(seed, verbose=False)
    observation_size, action_size = sizes(env)
    module = OnPolicyMDPO(
        GaussianPolicy(observation_size, action_size),
        ValueNetwork(observation_size),
        observation_size,
        optimizer=lambda params: MDPO(params, lr=lr, inner_steps=inner_steps, fused=True),
        critic_optimizer=lambda params: torch.optim.Adam(params, lr=lr, fused=True),
    )
    iterations = steps // 2048
    loop = trainer(iterations)
    start = time.process_time()
    loop.fit(module, RolloutDataModule(env, iterations_per_epoch=iterations, seed=seed))
    return float(loop.callback_metrics["train/return"]), time.process_time() - start


def theirs_on_policy(name: str, env: str, steps: int, seed: int) -> tuple[float, float]:
    from sb3_contrib import TRPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = VecNormalize(make_vec_env(env, n_envs=8, seed=seed))
    model = (PPO if name == "PPO" else TRPO)(
        "MlpPolicy", envs, n_steps=256, seed=seed, device="cpu", stats_window_size=40
    )
    start = time.process_time()
    model.learn(steps)
    return float(np.mean([episode["r"] for episode in model.ep_info_buffer])), time.process_time() - start


def on_policy(seeds: list[int]) -> None:
    peers = harness.peer("sb3_contrib") is not None
    for env, (steps, lr) in ON_POLICY.items():
        runs: dict[str, Callable[[int], tuple[float, float]]] = {
            "MDPO": lambda seed, e=env, n=steps, r=lr: ours_on_policy(e, n, seed, r),
            "MDPO, one inner step": lambda seed, e=env, n=steps, r=lr: ours_on_policy(e, n, seed, r, 1),
        }
        if peers:
            for name in ("PPO", "TRPO"):
                runs[name] = lambda seed, p=name, e=env, n=steps: theirs_on_policy(p, e, n, seed)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for i, seed in enumerate(seeds):
            names = list(runs)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                found[name].append(runs[name](seed))
        save(f"{env}, {steps} environment steps, {len(seeds)} seeds", rate_rows(found, steps, "PPO"))


def rate_rows(found: dict[str, list[tuple[float, float]]], work: int, baseline: str) -> list[harness.Row]:
    rows = []
    reference = found.get(baseline)
    for name, results in found.items():
        row: harness.Row = {
            "name": name,
            "return": round(float(np.mean([r for r, _ in results])), 1),
            "returns": [round(r, 1) for r, _ in results],
            "per_cpu_second": round(median(work / s for _, s in results)),
        }
        if reference is not None:
            pairs = zip(results, reference, strict=True)
            row[f"speed / {baseline}"] = round(median(theirs / s for (_, s), (_, theirs) in pairs), 2)
        rows.append(row)
    return rows


def ours_off_policy(env: str, updates: int, seed: int, width: int, batch: int, step_size: float) -> tuple[float, float]:
    L.seed_everything(seed, verbose=False)
    observation_size, action_size = sizes(env)
    space: Any = gym.make(env).action_space
    hidden = [width, width]
    module = OffPolicyMDPO(
        TanhGaussianActor(observation_size, action_size, hidden, low=space.low.tolist(), high=space.high.tolist()),
        TwinCritic(observation_size, action_size, hidden),
        ValueNetwork(observation_size, hidden, "ReLU", "default"),
        optimizer=lambda params: MDPO(
            params, inner_steps=1, step_size=step_size, anchor="parameters", anchor_interval=1000, max_grad_norm=None,
            fused=True,
        ),
    )  # fmt: skip
    loop = trainer(updates)
    data = ReplayDataModule(env, batch_size=batch, learning_starts=1000, updates_per_epoch=updates, seed=seed)
    start = time.process_time()
    loop.fit(module, data)
    seconds = time.process_time() - start
    return float(evaluate(module, env, {}, range(10)).returns.mean()), seconds


def theirs_off_policy(env: str, updates: int, seed: int, width: int, batch: int) -> tuple[float, float]:
    from stable_baselines3 import SAC
    from stable_baselines3.common.evaluation import evaluate_policy

    model = SAC(
        "MlpPolicy", gym.make(env), learning_starts=1000, batch_size=batch, seed=seed, device="cpu",
        policy_kwargs={"net_arch": [width, width]},
    )  # fmt: skip
    start = time.process_time()
    model.learn(1000 + updates)
    seconds = time.process_time() - start
    returns, _ = evaluate_policy(model, gym.make(env), n_eval_episodes=10)
    return float(returns), seconds  # type: ignore[arg-type]


def off_policy(seeds: list[int]) -> None:
    peers = harness.peer("stable_baselines3") is not None
    for env, updates, width, batch in (("Pendulum-v1", 9000, 64, 128), ("Hopper-v5", 2000, 256, 256)):
        settings = (width, batch)
        runs: dict[str, Callable[[int], tuple[float, float]]] = {
            "off-policy MDPO": lambda seed, e=env, n=updates, s=settings: ours_off_policy(e, n, seed, *s, 1.0),
            "its SAC limit": lambda seed, e=env, n=updates, s=settings: ours_off_policy(e, n, seed, *s, 5.0),
        }
        if peers:
            runs["SAC"] = lambda seed, e=env, n=updates, s=settings: theirs_off_policy(e, n, seed, *s)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for i, seed in enumerate(seeds):
            names = list(runs)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                found[name].append(runs[name](seed))
        title = f"{env}, {updates} updates of {batch}, 2x{width} units, {len(seeds)} seeds"
        save(title, rate_rows(found, updates, "SAC"))


def loader(seeds: list[int]) -> None:
    """Batches of 256 from 1e6 Hopper-shaped transitions, and reading them from their file."""
    rows = 10**6
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(rows, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": rng.random(rows) < 1e-3,
        "timeouts": np.arange(rows) % 1000 == 999,
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "hopper.hdf5"
        save_transitions_hdf5(path, arrays)

        def read() -> D4RLDataModule:
            data = D4RLDataModule(path, steps_per_epoch=10**9)
            data.setup("fit")
            return data

        reading = {"ours": read, "row by row in Python": lambda: row_by_row(arrays)}
        table = harness.ratios(harness.alternate(reading, rounds=3, warmup=0), "ours")  # type: ignore[arg-type]
        save("one million transitions from a file", table)
        data = read()
    columns = [
        torch.from_numpy(np.asarray(arrays[name])) for name in ("observations", "actions", "rewards", "terminals")
    ]
    dataset = TensorDataset(*columns, columns[0].roll(-1, 0))
    ours = iter(data.train_dataloader())
    theirs = iter(DataLoader(dataset, batch_size=256, shuffle=True))
    contenders = {"ours": lambda: next(ours), "DataLoader(TensorDataset, shuffle=True)": lambda: next(theirs)}
    table = harness.ratios(harness.alternate(contenders, rounds=15, inner=50), "ours")
    save("a batch of 256 transitions", table)


def row_by_row(arrays: dict[str, Any]) -> dict[str, Any]:
    """The loop that defines D4RL's ``qlearning_dataset``."""
    kept: dict[str, list[Any]] = {name: [] for name in ("observations", "actions", "next", "rewards", "terminals")}
    for i in range(len(arrays["rewards"]) - 1):
        if arrays["timeouts"][i]:
            continue
        kept["observations"].append(arrays["observations"][i].astype(np.float32))
        kept["next"].append(arrays["observations"][i + 1].astype(np.float32))
        kept["actions"].append(arrays["actions"][i].astype(np.float32))
        kept["rewards"].append(arrays["rewards"][i].astype(np.float32))
        kept["terminals"].append(bool(arrays["terminals"][i]))
    return {name: np.array(values) for name, values in kept.items()}


SECTIONS = {"on_policy": on_policy, "off_policy": off_policy, "loader": loader}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", default=list(SECTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for section in arguments.sections:
        SECTIONS[section](arguments.seeds)
