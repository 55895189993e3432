"""On-policy data: rollouts of the policy that is being trained."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.batches import RolloutBatch
from lit_methods.datamodules.rl.environments import Collector, EnvFactory, EnvironmentDataModule, Stream, gym
from lit_methods.datamodules.tensors import check_int


class RolloutDataModule(EnvironmentDataModule):
    """Batches of fresh rollouts (:class:`~lit_methods.batches.RolloutBatch`), collected by the module being trained.

    The module's ``act(observations)`` chooses the actions. Collection and training alternate strictly: a batch is
    collected when the loop asks for it, by the policy that the last ``training_step`` left. Episodes go on from one
    rollout to the next. Validation and test play whole episodes.

    Every rank has its own environments and seeds. Resuming is exact for simulators that are deterministic: episodes
    start from known seeds and are played again up to where they stood.

    Args:
        env: gymnasium id, or a function that builds an environment. Observations must be a Box, actions a Discrete or
            a Box of one dimension, to whose bounds actions are clipped on their way (not in the batch).
        num_envs: N, environments on each rank, >= 1.
        rollout_steps: T, steps of each environment per batch, >= 1.
        iterations_per_epoch: batches per epoch, >= 1.
        vectorization: "sync", or "async" for a process per environment, which pays for heavy simulators on many cores.
        num_eval_episodes: episodes per evaluation, >= 1.
        env_kwargs: keyword arguments of the environment.
        record_to: HDF5 file in D4RL's layout to write all training steps to when training ends (each rank its own;
            after a resume, those since).
        seed: of all episodes, >= 0.
        eval_actions: "mean": evaluate the module's deterministic actions; "sample": those it takes in training.

    Raises:
        ValueError: an argument out of range; in ``setup``, spaces that do not fit.
    """

    def __init__(
        self,
        env: EnvFactory,
        num_envs: int = 8,
        rollout_steps: int = 256,
        iterations_per_epoch: int = 10,
        vectorization: Literal["sync", "async"] = "sync",
        num_eval_episodes: int = 10,
        env_kwargs: dict[str, Any] | None = None,
        record_to: str | Path | None = None,
        seed: int = 0,
        eval_actions: Literal["mean", "sample"] = "mean",
    ) -> None:
        super().__init__(env, env_kwargs, num_eval_episodes, seed, record_to, eval_actions)
        self.num_envs = check_int("num_envs", num_envs, 1)
        self.rollout_steps = check_int("rollout_steps", rollout_steps, 1)
        self.iterations_per_epoch = check_int("iterations_per_epoch", iterations_per_epoch, 1)
        if vectorization not in ("sync", "async"):
            raise ValueError(f"Invalid vectorization={vectorization!r}: must be 'sync' or 'async'.")
        self.vectorization = vectorization

    def setup(self, stage: str) -> None:
        """Build the training environments."""
        assert self.spaces  # refuses others
        if stage == "fit" and self._collector is None:
            self._collector = self._collect(self.num_envs, self.vectorization)

    def train_dataloader(self) -> StatefulDataLoader:
        """Rollouts, one at a time."""
        assert self._collector is not None
        return StatefulDataLoader(_Rollouts(self, self._collector), batch_size=None)


class _Rollouts(Stream):
    def __init__(self, datamodule: RolloutDataModule, collector: Collector) -> None:
        self.datamodule = datamodule
        self.collector = collector

    def __len__(self) -> int:
        return self.datamodule.iterations_per_epoch

    def draw(self, place: int) -> RolloutBatch:
        """One rollout."""
        collector, agent, steps = self.collector, self.datamodule._agent(), self.datamodule.rollout_steps
        shape = (steps, self.datamodule.num_envs)
        observations = np.empty((*shape, *collector.observations.shape[1:]), np.float32)
        following = np.empty_like(observations)
        action_space = collector.envs.single_action_space
        discrete = isinstance(action_space, gym.spaces.Discrete)
        actions = np.empty((*shape, *action_space.shape), np.int64 if discrete else np.float32)  # type: ignore[misc]
        log_probs, rewards, terminations, truncations = np.empty((4, *shape), np.float32)
        for t in range(steps):
            observations[t] = collector.observations
            chosen, log_prob = agent.act(torch.from_numpy(observations[t]).to(agent.device))
            actions[t] = chosen.cpu().numpy()
            log_probs[t] = log_prob.cpu().numpy()
            following[t], rewards[t], terminations[t], truncations[t] = collector.step(actions[t])
        return RolloutBatch(
            torch.from_numpy(observations),
            torch.from_numpy(actions),
            torch.from_numpy(log_probs),
            torch.from_numpy(rewards),
            torch.from_numpy(following),
            torch.from_numpy(terminations),
            torch.from_numpy(truncations),
            collector.episode_returns(),
            torch.tensor(collector.steps),
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the environments stand."""
        return {"collector": self.collector.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.collector.load_state_dict(state_dict["collector"])
