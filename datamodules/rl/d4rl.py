"""Offline reinforcement learning data: D4RL files, Minari data sets, recordings of one's own."""

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.batches import SequenceBatch, Spaces, TransitionBatch
from lit_methods.datamodules.download import fetch
from lit_methods.datamodules.reading import reading
from lit_methods.datamodules.rl.d4rl_reference import dataset_url, reference_scores
from lit_methods.datamodules.rl.environments import EnvironmentDataModule, Stream, gym, spaces_of
from lit_methods.datamodules.rl.recordings import Arrays, load_minari, load_transitions_hdf5
from lit_methods.datamodules.rl.replay import PackedTransitions
from lit_methods.datamodules.tensors import check_int

_NO_RETURNS = torch.empty(0)


class D4RLDataModule(EnvironmentDataModule):
    """Transitions or whole episodes of a recorded data set, drawn with replacement.

    ``dataset`` is one of

    - a file in D4RL's HDF5 layout or a Minari folder (``.../name-v0`` or its ``data``), yours or downloaded;
    - a Minari id, such as ``mujoco/hopper/medium-v0``, found below ``$MINARI_DATASETS_PATH`` or downloaded;
    - a D4RL name, such as ``hopper-medium-v2``, found in ``$D4RL_DATASET_DIR`` or ``~/.d4rl/datasets`` or downloaded.

    Minari's sets are new recordings, not copies: published numbers on ``hopper-medium-v2`` are about the D4RL file.

    ``next_observations="shift"`` is what ``d4rl.qlearning_dataset`` does, and most papers with it: the next row's
    observation follows, the last row is dropped, and so is every row that a time limit cut. (Without a ``timeouts``
    array, the cuts are counted from ``max_episode_steps``; D4RL's own counter is off by one after the first episode.)
    "stored" uses the file's own ``next_observations`` and keeps these rows: more data, and the right bootstrap.

    Observations keep their shape and become float32 (images, too: 4 bytes for each pixel); integer actions stay int64.

    Validation and test play ``num_eval_episodes`` episodes in ``eval_env``; without one there are none.

    Args:
        dataset: see above.
        batch_size: transitions, or episodes, per batch on each rank, >= 1.
        steps_per_epoch: batches per epoch, >= 1.
        dataset_dir: where D4RL files are looked for and put; None: see above.
        download: fetch what is missing in ``prepare_data``.
        format: "d4rl", "minari", or "auto" to decide by the file or name.
        kind: "transitions", or "episodes": whole padded episodes (:class:`~lit_methods.batches.SequenceBatch`).
        next_observations: "shift" or "stored"; Minari sets always have "stored" ones.
        terminate_on_end: with "shift", keep the rows that were cut; their next observation belongs to the next episode
            (a known defect of D4RL, reproduced).
        max_episode_steps: time limit for files without ``timeouts``, >= 1.
        normalize_observations: subtract the data set's mean and divide by its standard deviation + 1e-3, also for the
            policy in evaluations.
        reward_scale: factor on rewards; "return_range" for 1000 / (best - worst episode return).
        reward_shift: added to rewards after scaling (antmaze: -1).
        eval_env: gymnasium id of the environment to evaluate in. The D4RL scores belong to the old ``-v2``
            environments, which ``-v4`` are closest to; ``-v5`` changed observations and rewards.
        num_eval_episodes: episodes per evaluation, >= 1.
        env_kwargs: keyword arguments of ``eval_env``.
        seed: of the draws and evaluation episodes, >= 0.
        eval_actions: "mean": evaluate the module's deterministic actions; "sample": those it takes in training.

    Attributes:
        num_transitions: how many there are, after ``setup``.
        transitions: all of them, packed into rows, after ``setup``; None for ``kind="episodes"``.
        observation_size: numbers in one observation.
        action_size: numbers in one action; 1 for discrete ones.
        observation_mean: mean that was subtracted, or zeros, ``(*observation)``.
        observation_std: what was divided by, or ones, ``(*observation)``.

    Raises:
        ValueError: an argument out of range, or a ``dataset`` of none of the three forms.
        FileNotFoundError: in ``setup``, when the data set is not there; the message names address and place.
    """

    def __init__(
        self,
        dataset: str | Path,
        batch_size: int = 256,
        steps_per_epoch: int = 1000,
        dataset_dir: str | Path | None = None,
        download: bool = False,
        format: Literal["auto", "d4rl", "minari"] = "auto",
        kind: Literal["transitions", "episodes"] = "transitions",
        next_observations: Literal["shift", "stored"] = "shift",
        terminate_on_end: bool = False,
        max_episode_steps: int = 1000,
        normalize_observations: bool = False,
        reward_scale: float | Literal["return_range"] = 1.0,
        reward_shift: float = 0.0,
        eval_env: str | None = None,
        num_eval_episodes: int = 10,
        env_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        eval_actions: Literal["mean", "sample"] = "mean",
    ) -> None:
        super().__init__(eval_env or "", env_kwargs, num_eval_episodes, seed, eval_actions=eval_actions)
        for name, value, allowed in (
            ("format", format, ("auto", "d4rl", "minari")),
            ("kind", kind, ("transitions", "episodes")),
            ("next_observations", next_observations, ("shift", "stored")),
        ):
            if value not in allowed:
                raise ValueError(f"Invalid {name}={value!r}: must be one of {', '.join(allowed)}.")
        if isinstance(reward_scale, str) and reward_scale != "return_range":
            raise ValueError(f"Invalid reward_scale={reward_scale!r}: must be a number or 'return_range'.")
        path = Path(dataset)
        self.dataset = str(path.parent if path.name == "main_data.hdf5" else dataset)  # Minari's own file
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.steps_per_epoch = check_int("steps_per_epoch", steps_per_epoch, 1)
        self.max_episode_steps = check_int("max_episode_steps", max_episode_steps, 1)
        folder = dataset_dir or os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets"
        self.dataset_dir = Path(folder)
        self.download = download
        self.format = _format(self.dataset) if format == "auto" else format
        self.kind = kind
        self.next_observations = next_observations
        self.terminate_on_end = terminate_on_end
        self.normalize_observations = normalize_observations
        self.reward_scale = reward_scale
        self.reward_shift = reward_shift
        self.eval_env = eval_env
        self._scores: tuple[float, float] | None = None
        self._dataset_id: str | None = None  # of a Minari folder
        self.transitions: PackedTransitions | None = None
        self._episodes: list[Arrays] = []

    def prepare_data(self) -> None:
        """Download what is missing, if ``download`` is set."""
        if not self.download or Path(self.dataset).exists():
            return
        if self.format == "d4rl":
            url = dataset_url(self.dataset)
            fetch([url], self._d4rl_path(), md5=None)
        else:
            import minari

            minari.load_dataset(self.dataset, download=True)

    def setup(self, stage: str) -> None:
        """Read the data set."""
        if self.transitions is not None or self._episodes:
            return
        arrays = self._read()
        ends = arrays["terminals"] | arrays.get("timeouts", np.zeros_like(arrays["terminals"]))
        if not ends.any():
            warnings.warn(f"{self.dataset}: no episode ends: treated as one unfinished episode", stacklevel=2)
        arrays["rewards"] = self._rescale(arrays["rewards"], ends)
        for name in ("observations", "next_observations"):
            if name in arrays:
                single = arrays[name].ndim == 1  # observations of one number
                arrays[name] = np.asarray(arrays[name][:, None] if single else arrays[name], np.float32)
        observations, actions = arrays["observations"], arrays["actions"]
        discrete = actions.dtype.kind in "iu" and actions.ndim == 1
        self._spaces = self._spaces_of(observations, actions, discrete)
        self.observation_size = observations[0].size
        self.action_size = actions[0].size
        self.observation_mean = torch.zeros(observations.shape[1:])
        self.observation_std = torch.ones(observations.shape[1:])
        if self.normalize_observations:
            self.observation_mean = torch.from_numpy(np.asarray(observations.mean(0)))
            self.observation_std = torch.from_numpy(np.asarray(observations.std(0))) + 1e-3
            for name in ("observations", "next_observations"):
                if name in arrays:
                    arrays[name] = self._normalize(torch.from_numpy(arrays[name])).numpy()
        if self.kind == "episodes":
            self._episodes = split_episodes(arrays)
            if not self._episodes:
                raise ValueError(f"{self.dataset} has no finished episode")
            self.num_transitions = sum(len(e["rewards"]) for e in self._episodes)
            return
        stored = self.next_observations == "stored" or self.format == "minari"
        rows = stored_transitions(arrays) if stored else self._shifted(arrays)
        number = len(rows["rewards"])
        if not number:
            raise ValueError(f"{self.dataset} has no transition")
        parts = [torch.from_numpy(np.asarray(rows[name], np.float32)).reshape(number, -1) for name in _COLUMNS]
        self.num_transitions = number
        size = 0 if discrete else self.action_size
        self.transitions = PackedTransitions(observations.shape[1:], size, self.num_transitions)
        self.transitions.add(torch.cat(parts, 1))

    def train_dataloader(self) -> StatefulDataLoader:
        """Random batches."""
        generator = torch.Generator().manual_seed(self.seed + 7919 * self._ranks()[0])
        return StatefulDataLoader(_Draws(self, generator), batch_size=None)

    def val_dataloader(self) -> Any:
        """Evaluation episodes in ``eval_env``."""
        return super().val_dataloader() if self.eval_env else []

    def test_dataloader(self) -> Any:
        """The same with other seeds."""
        return super().test_dataloader() if self.eval_env else []

    def predict_dataloader(self) -> StatefulDataLoader:
        """Observations of the data set, in order."""
        if self.transitions is None:
            observations = [torch.from_numpy(e["observations"]) for e in self._episodes]
        else:
            rows = self.transitions.rows[:, : self.observation_size]
            observations = list(rows.unflatten(1, self.transitions.observation_shape).split(self.batch_size))
        return StatefulDataLoader(observations, batch_size=None)

    def normalized_score(self, returns: Tensor | NDArray[Any] | float) -> NDArray[Any]:
        """``100 (return - ref_min) / (ref_max - ref_min)``.

        The references are those in a Minari set's metadata, else D4RL's for the task in the data set's name.

        Raises:
            ValueError: there are none.
        """
        local = self.format == "d4rl" or Path(self.dataset).exists()
        name = self._dataset_id or (Path(self.dataset).stem if local else self.dataset)
        low, high = self._scores or reference_scores(name)
        return 100 * (np.asarray(returns) - low) / (high - low)

    def make_eval_env(self, num_envs: int = 1) -> gym.vector.VectorEnv:
        """A vector of the evaluation environments."""
        if not self.eval_env:
            raise ValueError("eval_env=None: name the environment to evaluate in")
        return gym.make_vec(
            self.eval_env,
            num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP},
            **self.env_kwargs,
        )

    def _spaces_of(self, observations: NDArray[Any], actions: NDArray[Any], discrete: bool) -> Spaces:
        """Sizes of the data; bounds of ``eval_env``, or the extremes of the data."""
        shape, flat = observations.shape[1:], actions.reshape(len(actions), -1)
        number = int(actions.max()) + 1 if discrete else 0
        extremes = ((), ()) if discrete else (tuple(flat.min(0).tolist()), tuple(flat.max(0).tolist()))
        found = Spaces(shape, number, *extremes, observed=True)
        if not self.eval_env:
            return found
        env = gym.make(self.eval_env, disable_env_checker=True, **self.env_kwargs)
        expected = spaces_of(env.observation_space, env.action_space)
        env.close()
        if (found.observation_shape, len(found.low)) != (expected.observation_shape, len(expected.low)):
            raise ValueError(
                f"{self.dataset} must have observations of shape {expected.observation_shape} and {len(expected.low)} "
                f"numbers in an action, as eval_env={self.eval_env} has, got {shape} and {len(found.low)}"
            )
        return expected

    def _agent(self) -> Any:
        agent = super()._agent()
        return _Normalized(agent, self) if self.normalize_observations else agent

    def _normalize(self, observations: Tensor) -> Tensor:
        mean, std = (x.to(observations.device) for x in (self.observation_mean, self.observation_std))
        return (observations - mean) / std

    def _d4rl_path(self) -> Path:
        path = Path(self.dataset)
        return (
            path if path.suffix in (".hdf5", ".h5") else self.dataset_dir / dataset_url(self.dataset).rpartition("/")[2]
        )

    def _read(self) -> Arrays:
        if self.format == "d4rl":
            path = self._d4rl_path()
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is not there. Put the file there (from {dataset_url(self.dataset)}) or set download: true"
                    if path.parent == self.dataset_dir
                    else f"{path} is not there"
                )
            arrays = load_transitions_hdf5(path)
            if self.next_observations == "stored" and "next_observations" not in arrays:
                raise ValueError(f"{path} has no next_observations: use next_observations='shift'")
            return arrays
        import minari

        folder = Path(self.dataset)
        if folder.exists():
            with reading(folder, "a Minari data set"):
                data = minari.MinariDataset(folder if folder.name == "data" else folder / "data")
        else:
            try:
                data = minari.load_dataset(self.dataset)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"Minari data set {self.dataset} is not there: set download: true, run `minari download "
                    f"{self.dataset}`, or set MINARI_DATASETS_PATH to the folder it is in"
                ) from error
        metadata = data.storage.metadata
        if metadata.get("ref_min_score") is not None:
            self._scores = (float(metadata["ref_min_score"]), float(metadata["ref_max_score"]))
        elif folder.exists() and metadata.get("dataset_id"):
            self._dataset_id = str(metadata["dataset_id"])
        with reading(self.dataset, "a Minari data set"):
            return load_minari(data)

    def _shifted(self, arrays: Arrays) -> Arrays:
        if "timeouts" not in arrays:
            arrays = {**arrays, "timeouts": count_timeouts(arrays["terminals"], self.max_episode_steps)}
        return shifted_transitions(arrays, self.terminate_on_end)

    def _rescale(self, rewards: NDArray[Any], ends: NDArray[Any]) -> NDArray[Any]:
        scale = self.reward_scale
        if isinstance(scale, str):
            returns = episode_returns(rewards, ends)
            if returns.max() == returns.min():
                raise ValueError(f"reward_scale='return_range' needs episodes with different returns in {self.dataset}")
            scale = float(1000 / (returns.max() - returns.min()))
        return (rewards * scale + self.reward_shift).astype(np.float32)


_COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals")


def shifted_transitions(arrays: Arrays, terminate_on_end: bool = False) -> Arrays:
    """What ``d4rl.qlearning_dataset`` makes of a file with ``timeouts``, vectorised."""
    keep = np.ones(len(arrays["rewards"]) - 1, bool)
    if not terminate_on_end:
        keep &= ~arrays["timeouts"][:-1]
    rows = {name: arrays[name][:-1][keep] for name in ("observations", "actions", "rewards", "terminals")}
    return {**rows, "next_observations": arrays["observations"][1:][keep]}


def stored_transitions(arrays: Arrays) -> Arrays:
    """Every row, with the next observation that was recorded."""
    return {name: arrays[name] for name in _COLUMNS}


def count_timeouts(terminals: NDArray[Any], max_episode_steps: int) -> NDArray[Any]:
    """Cuts of a recording that only has terminations: every ``max_episode_steps`` steps of an episode."""
    steps = np.arange(len(terminals))
    starts = np.maximum.accumulate(np.where(np.r_[True, terminals[:-1]], steps, 0))
    return (steps - starts) % max_episode_steps == max_episode_steps - 1


def episode_returns(rewards: NDArray[Any], ends: NDArray[Any]) -> NDArray[Any]:
    """Undiscounted returns of the episodes; an unfinished last one counts."""
    starts = np.r_[0, np.flatnonzero(ends[:-1]) + 1]
    return np.add.reduceat(rewards.astype(np.float64), starts)


def split_episodes(arrays: Arrays) -> list[Arrays]:
    """Whole episodes, with ``returns_to_go``; an unfinished last one is left out."""
    ends = arrays["terminals"] | arrays.get("timeouts", np.zeros_like(arrays["terminals"]))
    episodes, start = [], 0
    for stop in (np.flatnonzero(ends) + 1).tolist():
        episode = {name: values[start:stop] for name, values in arrays.items()}
        rewards = episode["rewards"].astype(np.float64)
        episode["returns_to_go"] = rewards[::-1].cumsum()[::-1].astype(np.float32)
        episodes.append(episode)
        start = stop
    return episodes


class _Draws(Stream):
    """Batches with replacement."""

    def __init__(self, datamodule: D4RLDataModule, generator: torch.Generator) -> None:
        self.datamodule = datamodule
        self.generator = generator

    def __len__(self) -> int:
        return self.datamodule.steps_per_epoch

    def draw(self, place: int) -> TransitionBatch | SequenceBatch:
        transitions, episodes = self.datamodule.transitions, self.datamodule._episodes
        number = len(episodes) if transitions is None else len(transitions)
        rows = torch.randint(number, (self.datamodule.batch_size,), generator=self.generator)
        if transitions is None:
            return _pad([episodes[i] for i in rows.tolist()])
        return transitions.batch(rows, _NO_RETURNS, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.set_state(state_dict["generator"])


class _Normalized:
    """An agent that sees observations as the data set was normalised."""

    def __init__(self, agent: Any, datamodule: D4RLDataModule) -> None:
        self.agent = agent
        self.datamodule = datamodule
        self.device = agent.device

    def act(self, observations: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        return self.agent.act(self.datamodule._normalize(observations), deterministic)


def _pad(episodes: list[Arrays]) -> SequenceBatch:
    lengths = torch.tensor([len(e["rewards"]) for e in episodes])
    columns = []
    for name in ("observations", "actions", "rewards", "returns_to_go", "terminals"):
        values = [torch.from_numpy(np.ascontiguousarray(e[name])) for e in episodes]
        padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        columns.append(padded.float() if name == "terminals" else padded)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    observations, actions, rewards, returns_to_go, terminations = columns
    return SequenceBatch(observations, actions, rewards, returns_to_go, terminations, mask)


def _format(dataset: str) -> Literal["d4rl", "minari"]:
    path = Path(dataset)
    if path.is_file() and path.suffix in (".hdf5", ".h5"):
        return "d4rl"
    if path.is_dir() and any((path / name).exists() for name in ("metadata.json", "data/metadata.json")):
        return "minari"
    if "://" in dataset or ("/" in dataset and not path.suffix):
        return "minari"
    if path.suffix in (".hdf5", ".h5"):
        return "d4rl"
    try:
        dataset_url(dataset)
    except ValueError as error:
        raise ValueError(
            f"Invalid dataset={dataset!r}: must be a .hdf5 file or a Minari folder, a Minari id with a slash, or a "
            f"D4RL name. {error}"
        ) from None
    return "d4rl"
