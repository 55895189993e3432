"""Gymnasium environments for datamodules: vectors of them whose state a checkpoint can hold, and evaluation."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.batches import EpisodeBatch, Spaces
from lit_methods.datamodules.tensors import check_int

try:
    import gymnasium as gym
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('environments need gymnasium: pip install "lit-methods[rl]"') from error

EnvFactory = str | Callable[..., gym.Env]
"""A gymnasium id, or a function that builds an environment from keyword arguments."""


class Agent(Protocol):
    """What collects and evaluates: any module with an ``act`` method."""

    def act(self, observations: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Actions and their log-densities for observations ``(N, *observation)``."""


class SeededEpisodes(gym.Wrapper):
    """Starts episode ``i`` from seed ``(seed, i)`` and remembers its actions, so that it can be played again.

    A simulator's state cannot be saved through gymnasium, but a deterministic environment comes back to it when the
    episode's seed and actions are repeated. Infos are dropped: nothing here needs them, and vector environments spend
    time on merging them.

    Args:
        env: the environment; after ``reset(seed=...)`` a function of the actions alone.
        seed: of all its episodes.
    """

    def __init__(self, env: gym.Env, seed: int) -> None:
        super().__init__(env)
        self.base_seed = seed
        self.episode = -1
        self.actions: list[Any] = []
        self.pending: dict[str, Any] | None = None  # an attribute, for vector environments set one per environment

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode; ``seed`` is not used."""
        self.episode += 1
        self.actions = []
        words = np.random.SeedSequence([self.base_seed, self.episode]).generate_state(1)
        return self.env.reset(seed=int(words[0]) % 2**31)[0], {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step."""
        self.actions.append(action)
        observation, reward, terminated, truncated, _ = self.env.step(action)
        return observation, reward, terminated, truncated, {}

    def place(self) -> dict[str, Any]:
        """The episode's number and its actions so far."""
        return {"episode": self.episode, "actions": torch.as_tensor(np.array(self.actions))}

    def resume(self) -> Any:
        """Go to the place that is in ``pending``, and return the observation there."""
        assert self.pending is not None
        self.episode = self.pending["episode"] - 1
        observation, _ = self.reset()
        for action in self.pending["actions"].numpy():
            observation = self.step(action)[0]
        return observation


class Collector:
    """Steps a vector of environments and keeps the books that training needs.

    Args:
        factory: what builds one environment.
        env_kwargs: its keyword arguments.
        num_envs: N.
        vectorization: "sync" (one process; faster for all light simulators) or "async" (a process each).
        seed: of all episodes, this rank's own.
        record: keep every step for :meth:`recording`.
    """

    def __init__(
        self,
        factory: EnvFactory,
        env_kwargs: dict[str, Any],
        num_envs: int,
        vectorization: str,
        seed: int,
        record: bool = False,
    ) -> None:
        makers = [partial(_seeded, factory, env_kwargs, seed, i) for i in range(num_envs)]
        kind = SyncVectorEnv if vectorization == "sync" else AsyncVectorEnv
        self.envs: SyncVectorEnv | AsyncVectorEnv = kind(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        space = self.envs.single_action_space
        self.bounds = (space.low, space.high) if isinstance(space, gym.spaces.Box) else None
        self.steps = 0
        self.running = np.zeros(num_envs)
        self.finished: list[float] = []
        self.record = record
        self._recorded: list[tuple[NDArray[Any], ...]] = []
        self.observations = _float32(self.envs.reset()[0])

    def step(self, actions: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Take actions ``(N, ...)``, clipped to the bounds.

        Returns:
            The true next observations (final ones where episodes ended), rewards, terminations and truncations;
            ``self.observations`` is where the environments stand afterwards.
        """
        if self.bounds is not None:
            actions = np.clip(actions, *self.bounds)
        before = self.observations
        observations, rewards, terminated, truncated, info = self.envs.step(actions)
        following = self.observations = _float32(observations)
        self.steps += len(rewards)
        self.running += rewards
        ended = terminated | truncated
        if ended.any():
            following = following.copy()
            for i in np.flatnonzero(ended):
                following[i] = info["final_obs"][i]
            self.finished += self.running[ended].tolist()
            self.running[ended] = 0
        if self.record:
            self._recorded.append((before, actions, rewards, terminated, truncated, following))
        return following, rewards, terminated, truncated

    def episode_returns(self) -> Tensor:
        """Returns of the episodes that ended since the last call."""
        finished, self.finished = self.finished, []
        return torch.tensor(finished, dtype=torch.float32)

    def recording(self) -> dict[str, NDArray[Any]]:
        """The recorded steps in D4RL's layout, environment by environment; the last step of each is a cut."""
        names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
        columns = (np.stack(column, 1) for column in zip(*self._recorded, strict=True))  # (N, T, ...)
        arrays = dict(zip(names, columns, strict=True))
        arrays["timeouts"][:, -1] |= ~arrays["terminals"][:, -1]
        return {name: values.reshape(-1, *values.shape[2:]) for name, values in arrays.items()}

    def state_dict(self) -> dict[str, Any]:
        """Where every environment stands."""
        return {"places": list(self.envs.call("place")), "steps": self.steps, "running": torch.tensor(self.running)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go there."""
        places = state_dict["places"]
        if len(places) != self.envs.num_envs:
            raise ValueError(f"the checkpoint has {len(places)} environments, num_envs={self.envs.num_envs}")
        self.envs.set_attr("pending", places)
        observations = self.envs.call("resume")
        self.observations = np.stack([_float32(o) for o in observations])
        self.steps = state_dict["steps"]
        self.running = state_dict["running"].numpy().copy()
        self.finished = []

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()


class Stream(IterableDataset[Any]):
    """A stream of batches that goes on across epochs.

    It has a length so that Lightning asks for a batch when it trains, not one ahead. Its state is the stream's; the
    place in an epoch is the state of the iterator, so that an epoch may also end early.
    """

    def draw(self, place: int) -> Any:
        """The next batch, number ``place`` of its epoch."""
        raise NotImplementedError

    def __iter__(self) -> "_Epoch":
        return _Epoch(self)


class _Epoch(Iterator[Any]):
    """One epoch of a :class:`Stream`."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.place = 0

    def __next__(self) -> Any:
        if self.place == len(self.stream):
            raise StopIteration
        self.place += 1
        return self.stream.draw(self.place - 1)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.place = state_dict["place"]


class EnvironmentDataModule(pl.LightningDataModule):
    """Evaluation episodes for validation and test, and what training data from environments shares.

    Validation and test play ``num_eval_episodes`` episodes, shared out over the ranks, in environments of their own,
    from the same seeds every time; prediction is over their first observations.

    Args:
        env: gymnasium id, or a function that builds an environment.
        env_kwargs: its keyword arguments.
        num_eval_episodes: episodes per evaluation, >= 1.
        seed: of training and evaluation episodes, >= 0.
        record_to: HDF5 file to write the training steps to when training ends.
        eval_actions: "mean": the module's deterministic actions; "sample": what it does in training.
    """

    def __init__(
        self,
        env: EnvFactory,
        env_kwargs: dict[str, Any] | None,
        num_eval_episodes: int,
        seed: int,
        record_to: str | Path | None = None,
        eval_actions: Literal["mean", "sample"] = "mean",
    ) -> None:
        super().__init__()
        if eval_actions not in ("mean", "sample"):
            raise ValueError(f"eval_actions must be 'mean' or 'sample', got {eval_actions!r}")
        self.record_to = record_to
        self.eval_actions = eval_actions
        self._collector: Collector | None = None
        self._spaces: Spaces | None = None
        self.env = env
        self.env_kwargs = env_kwargs or {}
        self.num_eval_episodes = check_int("num_eval_episodes", num_eval_episodes, 1)
        self.seed = check_int("seed", seed, 0)

    @property
    def spaces(self) -> Spaces:
        """What the environment takes and gives.

        Raises:
            ValueError: spaces that the methods cannot use.
        """
        if self._spaces is None:
            env = make_env(self.env, self.env_kwargs)
            self._spaces = spaces_of(env.observation_space, env.action_space)
            env.close()
        return self._spaces

    def val_dataloader(self) -> StatefulDataLoader:
        """One batch: the evaluation episodes of this rank."""
        return StatefulDataLoader(_Evaluation(self, self._eval_seeds(10**6)), batch_size=None)

    def test_dataloader(self) -> StatefulDataLoader:
        """The same with other seeds."""
        return StatefulDataLoader(_Evaluation(self, self._eval_seeds(2 * 10**6)), batch_size=None)

    def predict_dataloader(self) -> StatefulDataLoader:
        """One batch: first observations, float32 ``(num_eval_episodes, *observation)``."""
        env = make_env(self.env, self.env_kwargs)
        observations = np.stack([env.reset(seed=seed)[0] for seed in self._eval_seeds(10**6)])
        env.close()
        return StatefulDataLoader([torch.from_numpy(_float32(observations))], batch_size=None)

    def teardown(self, stage: str) -> None:
        """Write what was recorded, and close the training environments."""
        if self._collector is None or stage != "fit":
            return
        if self._collector.record and self._collector.steps:
            from lit_methods.datamodules.rl.recordings import save_transitions_hdf5

            path = Path(str(self.record_to))
            rank, world_size = self._ranks()
            path = path if world_size == 1 else path.with_stem(f"{path.stem}-rank{rank}")
            save_transitions_hdf5(path, self._collector.recording(), {"environment": str(self.env)})
        self._collector.close()
        self._collector = None

    def _collect(self, num_envs: int, vectorization: str) -> Collector:
        seed = self.seed + 10_000 * self._ranks()[0]
        record = self.record_to is not None
        return Collector(self.env, self.env_kwargs, num_envs, vectorization, seed, record)

    def _eval_seeds(self, offset: int) -> list[int]:
        rank, world_size = self._ranks()
        return [
            offset + 10_000 * self.seed + i for i in range(rank, max(self.num_eval_episodes, world_size), world_size)
        ]

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _agent(self) -> Any:
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        if not hasattr(module, "act"):
            raise TypeError(f"{type(module).__name__} has no act(observations, deterministic), which chooses actions")
        return module


class _Evaluation(IterableDataset[EpisodeBatch]):
    """Plays when it is iterated."""

    def __init__(self, datamodule: EnvironmentDataModule, seeds: list[int]) -> None:
        self.datamodule = datamodule
        self.seeds = seeds

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[EpisodeBatch]:
        data, agent = self.datamodule, self.datamodule._agent()
        yield evaluate(agent, data.env, data.env_kwargs, self.seeds, agent.device, data.eval_actions == "mean")


def make_env(factory: EnvFactory, env_kwargs: dict[str, Any]) -> gym.Env:
    """One environment."""
    if callable(factory):
        return factory(**env_kwargs)
    return gym.make(factory, disable_env_checker=True, **env_kwargs)


def spaces_of(observations: gym.Space, actions: gym.Space) -> Spaces:
    """What networks need to know of them.

    Raises:
        ValueError: observations are no Box, or actions neither a Discrete nor a Box of one dimension.
    """
    if not isinstance(observations, gym.spaces.Box):
        raise ValueError(
            f"observation space {observations} is not a Box; flatten it with gymnasium.wrappers.FlattenObservation"
        )
    if isinstance(actions, gym.spaces.Discrete):
        if actions.start != 0:
            raise ValueError(f"action space {actions} must start at 0")
        return Spaces(observations.shape, int(actions.n), (), ())
    if not isinstance(actions, gym.spaces.Box) or len(actions.shape) != 1:
        raise ValueError(f"action space {actions} must be a Discrete or a Box of one dimension")
    return Spaces(observations.shape, 0, tuple(actions.low.tolist()), tuple(actions.high.tolist()))


def evaluate(
    agent: Agent,
    factory: EnvFactory,
    env_kwargs: dict[str, Any],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    deterministic: bool = True,
) -> EpisodeBatch:
    """Play one episode per seed, in environments of their own; random actions, too, are the same every time."""
    envs = SyncVectorEnv([partial(make_env, factory, env_kwargs)] * len(seeds), autoreset_mode=AutoresetMode.SAME_STEP)
    space = envs.single_action_space
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), np.int64)
    playing = np.ones(len(seeds), bool)
    with torch.random.fork_rng(enabled=not deterministic):
        if not deterministic:
            torch.manual_seed(seeds[0])
        observations, _ = envs.reset(seed=list(seeds))
        while playing.any():
            actions, _ = agent.act(torch.from_numpy(_float32(observations)).to(device), deterministic)
            chosen = actions.float().cpu().numpy() if isinstance(space, gym.spaces.Box) else actions.cpu().numpy()
            chosen = np.clip(chosen, space.low, space.high) if isinstance(space, gym.spaces.Box) else chosen
            observations, rewards, terminated, truncated, _ = envs.step(chosen)
            returns += rewards * playing
            lengths += playing
            playing &= ~(terminated | truncated)
    envs.close()
    return EpisodeBatch(torch.tensor(returns, dtype=torch.float32), torch.tensor(lengths))


def _seeded(factory: EnvFactory, env_kwargs: dict[str, Any], seed: int, index: int) -> gym.Env:
    return SeededEpisodes(make_env(factory, env_kwargs), seed * 1_000_003 + index)


def _float32(x: Any) -> NDArray[Any]:
    return np.asarray(x, dtype=np.float32)
