"""Recordings of experience: D4RL's HDF5 layout and Minari data sets, read and written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.reading import check_unpacked_size, reading
from lit_methods.datamodules.rl.environments import gym

try:
    import h5py
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('recordings need h5py: pip install "lit-methods[rl]"') from error

Arrays = dict[str, NDArray[Any]]
_REQUIRED = ("observations", "actions", "rewards", "terminals")
_FLAT = ("rewards", "terminals", "timeouts")


def save_transitions_hdf5(
    path: str | Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one HDF5 file in D4RL's layout: flat arrays of ``N`` steps in time order, episodes one after the other.

    Args:
        path: the file; an existing one is replaced.
        arrays: ``observations (N, ...)``, ``actions (N, ...)``, ``rewards (N,)``, ``terminals (N,)``, and, so that
            nothing is lost, ``timeouts (N,)`` (cut after this step) and ``next_observations (N, ...)``; further arrays
            of the same length are kept, with a slash in the name for groups (``infos/qpos``).
        metadata: strings, kept under ``metadata/``.

    Raises:
        KeyError: an array is missing.
        ValueError: arrays of different lengths, or rewards that are not finite.
    """
    path = Path(path)
    check_arrays(arrays, str(path))
    part = path.with_name(path.name + ".part")
    with h5py.File(part, "w") as file:
        for name, array in arrays.items():
            values = np.asarray(array)
            file.create_dataset(name, data=values.astype(np.float32) if values.dtype == np.float64 else values)
        for name, text in (metadata or {}).items():
            file[f"metadata/{name}"] = text
    part.replace(path)


def load_transitions_hdf5(path: str | Path) -> Arrays:
    """Read a file in D4RL's layout: floats as float32, flags as bool, ``(N, 1)`` as ``(N,)``.

    What is under ``metadata`` is left out, and single numbers or texts, which belong to no step.

    Raises:
        KeyError: a required array is missing.
        ValueError: a damaged file, no steps, arrays of different lengths, or numbers that are none or not finite.
    """
    arrays: Arrays = {}

    def read(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and not name.startswith("metadata/") and (item.ndim or name in _REQUIRED):
            check_unpacked_size(f"{path}:{name}", Path(path).stat().st_size, item.nbytes)
            arrays[name] = np.asarray(item[()])

    with reading(path, "an HDF5 file"), h5py.File(path, "r") as file:
        file.visititems(read)
    for name in _REQUIRED:
        if name in arrays and arrays[name].ndim == 0:
            raise ValueError(f"{path}: {name} must have an entry for each step, got the single value {arrays[name]}")
    for name, values in arrays.items():
        flat = values[:, 0] if name in _FLAT and values.ndim == 2 and values.shape[1] == 1 else values
        if name in ("terminals", "timeouts"):
            flat = flat.astype(bool) if flat.dtype.kind in "biuf" else flat
        arrays[name] = flat.astype(np.float32) if flat.dtype.kind == "f" else flat
    check_arrays(arrays, str(path))
    return arrays


def check_arrays(arrays: Mapping[str, NDArray[Any]], source: str) -> None:
    """Refuse arrays that are no recording."""
    for name in _REQUIRED:
        if name not in arrays:
            raise KeyError(f"{source} has no {name!r}; found {', '.join(sorted(arrays))}")
    steps = len(arrays["observations"])
    if not steps:
        raise ValueError(f"{source} holds no steps")
    for name, values in arrays.items():
        if len(values) != steps:
            raise ValueError(f"{source}: {name} has {len(values)} steps, observations have {steps}")
    for name in (*_REQUIRED, "timeouts", "next_observations"):
        if name not in arrays:
            continue
        values = np.asarray(arrays[name])
        if values.dtype.kind not in "biuf":
            raise ValueError(f"{source}: {name} must be numbers, got {values.dtype}")
        if name in _FLAT and values.ndim != 1:
            raise ValueError(f"{source}: {name} must be one number for each step, got shape {values.shape}")
        finite = np.isfinite(values).reshape(steps, -1).all(1)
        if not finite.all():
            raise ValueError(f"{source}: {name} must be finite, which step {int(np.argmin(finite))} is not")


def save_minari(
    dataset: str, episodes: Sequence[Mapping[str, NDArray[Any]]], env: gym.Env | None = None, **metadata: Any
) -> Any:
    """Write a Minari data set below ``$MINARI_DATASETS_PATH`` (or ``~/.minari/datasets``).

    Args:
        dataset: its id, such as ``"hopper/mine-v0"``.
        episodes: per episode ``observations (T + 1, ...)``, ``actions (T, ...)``, ``rewards (T,)``, ``terminations
            (T,)`` and ``truncations (T,)``.
        env: the environment they were recorded in, for its spaces and id.
        **metadata: for ``minari.create_dataset_from_buffers``: ``algorithm_name``, ``author``, ``ref_min_score`` ...

    Returns:
        The ``minari.MinariDataset``.

    Raises:
        ValueError: an episode whose arrays do not fit together.
    """
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for i, episode in enumerate(episodes):
        steps = len(episode["actions"])
        for name, expected in (("observations", steps + 1), ("rewards", steps), ("terminations", steps)):
            if len(episode[name]) != expected:
                raise ValueError(f"episode {i}: {name} has {len(episode[name])} entries, not {expected}")
        buffers.append(
            EpisodeBuffer(
                id=i,
                seed=None,
                observations=np.asarray(episode["observations"]),
                actions=np.asarray(episode["actions"]),
                rewards=list(np.asarray(episode["rewards"], float)),
                terminations=list(map(bool, episode["terminations"])),
                truncations=list(map(bool, episode["truncations"])),
                infos={},
            )
        )
    return minari.create_dataset_from_buffers(dataset, buffer=buffers, env=env, data_format="hdf5", **metadata)


def load_minari(dataset: Any) -> Arrays:
    """The arrays of a ``minari.MinariDataset`` in D4RL's layout; next observations are exact also at cuts.

    Raises:
        ValueError: observations or actions that are not plain arrays.
    """
    parts: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    }
    for episode in dataset.iterate_episodes():
        if not isinstance(episode.observations, np.ndarray) or not isinstance(episode.actions, np.ndarray):
            raise ValueError(
                f"{dataset.spec.dataset_id} has structured observations or actions; flatten them into a data set of "
                "your own (lit_methods.datamodules.save_minari)"
            )
        truncations = np.asarray(episode.truncations).astype(bool)
        truncations[-1] |= not episode.terminations[-1]  # an unfinished episode is cut where the recording stops
        parts["observations"].append(episode.observations[:-1])
        parts["next_observations"].append(episode.observations[1:])
        parts["actions"].append(episode.actions)
        parts["rewards"].append(np.asarray(episode.rewards))
        parts["terminals"].append(np.asarray(episode.terminations).astype(bool))
        parts["timeouts"].append(truncations)
    source = dataset.spec.dataset_id
    if not parts["rewards"]:
        raise ValueError(f"{source} holds no episodes")
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    check_arrays(arrays, source)
    return {name: values.astype(np.float32) if values.dtype.kind == "f" else values for name, values in arrays.items()}
