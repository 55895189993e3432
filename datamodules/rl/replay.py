"""Off-policy data: a replay buffer that grows while the policy trains on it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.batches import TransitionBatch
from lit_methods.datamodules.rl.environments import Collector, EnvFactory, EnvironmentDataModule, Stream
from lit_methods.datamodules.tensors import check_int


class ReplayDataModule(EnvironmentDataModule):
    """Mini-batches (:class:`~lit_methods.batches.TransitionBatch`) from the steps of the policy that is being trained.

    Before a batch is drawn, each environment takes ``steps_per_update`` steps (once for every ``updates_per_step``
    batches) with the module's ``act``; the first ``learning_starts`` steps are uniformly random. Batches are drawn
    with replacement. Time limits are not terminations.

    Every rank has its own environments, buffer and seeds. Resuming is exact with ``save_buffer``, for deterministic
    simulators; without it, a resumed run first refills the buffer with ``learning_starts`` steps of its policy.

    Args:
        env: gymnasium id, or a function that builds an environment. Observations must be a Box of one dimension,
            actions a bounded Box.
        num_envs: environments on each rank, >= 1.
        capacity: transitions kept, >= 1; the oldest go first. One takes 4 (2 observation + action + 2) bytes.
        batch_size: transitions per batch, >= 1.
        learning_starts: random steps before the first batch, on each rank, >= 1.
        steps_per_update: steps of each environment before an update, >= 1.
        updates_per_step: batches after each of these, >= 1.
        updates_per_epoch: batches per epoch, >= 1.
        save_buffer: put the buffer into checkpoints.
        num_eval_episodes: episodes per evaluation, >= 1.
        env_kwargs: keyword arguments of the environment.
        record_to: HDF5 file in D4RL's layout to write all training steps to when training ends (each rank its own;
            after a resume, those since).
        seed: of all episodes, the random steps and the draws, >= 0.
        eval_actions: "mean": evaluate the module's deterministic actions; "sample": those it takes in training.

    Raises:
        ValueError: an argument out of range; in ``setup``, spaces that do not fit.
    """

    def __init__(
        self,
        env: EnvFactory,
        num_envs: int = 1,
        capacity: int = 1_000_000,
        batch_size: int = 256,
        learning_starts: int = 10_000,
        steps_per_update: int = 1,
        updates_per_step: int = 1,
        updates_per_epoch: int = 1000,
        save_buffer: bool = False,
        num_eval_episodes: int = 10,
        env_kwargs: dict[str, Any] | None = None,
        record_to: str | Path | None = None,
        seed: int = 0,
        eval_actions: Literal["mean", "sample"] = "mean",
    ) -> None:
        super().__init__(env, env_kwargs, num_eval_episodes, seed, record_to, eval_actions)
        self.num_envs = check_int("num_envs", num_envs, 1)
        self.capacity = check_int("capacity", capacity, 1)
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.learning_starts = check_int("learning_starts", learning_starts, 1)
        self.steps_per_update = check_int("steps_per_update", steps_per_update, 1)
        self.updates_per_step = check_int("updates_per_step", updates_per_step, 1)
        self.updates_per_epoch = check_int("updates_per_epoch", updates_per_epoch, 1)
        self.save_buffer = save_buffer

    def setup(self, stage: str) -> None:
        """Build the training environments."""
        spaces = self.spaces
        if spaces.num_actions:
            raise ValueError(
                f"actions must be a Box, got Discrete({spaces.num_actions}): use RolloutDataModule and an on-policy "
                "method for discrete actions"
            )
        if not np.isfinite([*spaces.low, *spaces.high]).all():
            raise ValueError(
                f"actions must have finite bounds, got {spaces.low} and {spaces.high}. If "
                "gymnasium.wrappers.ClipAction took them away, leave it out: actions are clipped anyway"
            )
        if len(spaces.observation_shape) != 1:
            raise ValueError(
                f"observations must have one dimension, got shape {spaces.observation_shape}: flatten them with "
                "gymnasium.wrappers.FlattenObservation"
            )
        if stage == "fit" and self._collector is None:
            self._collector = self._collect(self.num_envs, "sync")

    def train_dataloader(self) -> StatefulDataLoader:
        """Mini-batches, after the steps that are due."""
        assert self._collector is not None
        return StatefulDataLoader(_Replay(self, self._collector), batch_size=None)


class PackedTransitions:
    """Transitions as rows of one float32 matrix: a batch is a single gather.

    Args:
        observation_shape: of one observation; its numbers stand side by side.
        action_size: numbers in one action; 0: one number, which is a discrete action.
        capacity: rows.
    """

    def __init__(self, observation_shape: Sequence[int], action_size: int, capacity: int) -> None:
        self.observation_shape = tuple(observation_shape)
        self.discrete = action_size == 0
        observation_size = math.prod(self.observation_shape)
        self.widths = (observation_size, max(action_size, 1), 1, observation_size, 1)
        self.rows = torch.empty(capacity, sum(self.widths))
        self.total = 0  # ever added

    def __len__(self) -> int:
        return min(self.total, len(self.rows))

    def add(self, rows: Tensor) -> None:
        """Add ``(n, observation | action | reward | next observation | termination)``, over the oldest if need be."""
        places = torch.arange(self.total, self.total + len(rows)) % len(self.rows)
        self.rows[places] = rows
        self.total += len(rows)

    def batch(self, indices: Tensor, episode_returns: Tensor, env_steps: int) -> TransitionBatch:
        """The transitions in these rows."""
        observations, actions, rewards, following, terminations = self.rows.index_select(0, indices).split(
            self.widths, 1
        )
        return TransitionBatch(
            observations.unflatten(1, self.observation_shape),
            actions[:, 0].long() if self.discrete else actions,
            rewards[:, 0],
            following.unflatten(1, self.observation_shape),
            terminations[:, 0],
            episode_returns,
            torch.tensor(env_steps),
        )


class _Replay(Stream):
    def __init__(self, datamodule: ReplayDataModule, collector: Collector) -> None:
        self.datamodule = datamodule
        self.collector = collector
        spaces = datamodule.spaces
        self.buffer = PackedTransitions(spaces.observation_shape, len(spaces.low), datamodule.capacity)
        self.generator = torch.Generator().manual_seed(datamodule.seed + 7919 * datamodule._ranks()[0])

    def __len__(self) -> int:
        return self.datamodule.updates_per_epoch

    def draw(self, place: int) -> TransitionBatch:
        """Take the steps that are due, then draw a batch."""
        settings = self.datamodule
        while len(self.buffer) < min(settings.learning_starts, settings.capacity):
            self._step(random=self.collector.steps < settings.learning_starts)
        if place % settings.updates_per_step == 0:
            for _ in range(settings.steps_per_update):
                self._step()
        indices = torch.randint(len(self.buffer), (settings.batch_size,), generator=self.generator)
        return self.buffer.batch(indices, self.collector.episode_returns(), self.collector.steps)

    def _step(self, random: bool = False) -> None:
        observations = torch.from_numpy(self.collector.observations)
        if random:
            low, high = (torch.from_numpy(bound) for bound in self.collector.bounds)  # type: ignore[union-attr]
            draw = torch.rand(len(observations), len(low), generator=self.generator)
            actions = (low + (high - low) * draw).float()
        else:
            agent = self.datamodule._agent()
            actions = agent.act(observations.to(agent.device))[0].cpu()
        following, rewards, terminated, _ = self.collector.step(actions.numpy())
        columns = (np.asarray(rewards, np.float32)[:, None], following, np.asarray(terminated, np.float32)[:, None])
        self.buffer.add(torch.cat([observations, actions, *map(torch.from_numpy, columns)], 1))

    def state_dict(self) -> dict[str, Any]:
        """Draws, environments, and the buffer if it is to be saved."""
        state = {"generator": self.generator.get_state(), "collector": self.collector.state_dict()}
        if self.datamodule.save_buffer:
            state |= {"rows": self.buffer.rows[: len(self.buffer)].clone(), "total": self.buffer.total}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.generator.set_state(state_dict["generator"])
        self.collector.load_state_dict(state_dict["collector"])
        if "rows" in state_dict:
            self.buffer.rows[: len(state_dict["rows"])] = state_dict["rows"]
            self.buffer.total = state_dict["total"]
