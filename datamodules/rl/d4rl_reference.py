"""D4RL's reference scores and file addresses: facts, so that nothing needs the ``d4rl`` package.

Fu et al., "D4RL: Datasets for Deep Data-Driven Reinforcement Learning", arXiv 2004.07219. The package itself
(``pip install d4rl``) is only ever read as a table of more addresses; importing it needs software of 2022.
"""

import importlib.metadata
import importlib.util
import re
from types import ModuleType

SCORES: dict[str, tuple[float, float]] = {
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "carla-lane": (-0.8503839912088142, 1023.5784385429523),
    "carla-town": (-114.81579500772153, 2440.1772022247314),
    "door": (-56.512833, 2880.5693087298737),
    "flow-merge": (118.67993, 330.03179),
    "flow-ring": (-165.22, 24.42),
    "halfcheetah": (-280.178953, 12135.0),
    "hammer": (-274.856578, 12794.134825156867),
    "hopper": (-20.272305, 3234.3),
    "kitchen": (0.0, 4.0),
    "maze2d-large": (6.7, 273.99),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-open": (0.01, 20.66),
    "maze2d-open-dense": (11.17817, 27.166538620695782),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "minigrid-fourrooms": (0.01442, 2.89685),
    "pen": (96.262799, 3076.8331017826877),
    "relocate": (-6.425911, 4233.877797728884),
    "walker2d": (1.629008, 4592.3),
}
"""Task -> returns that count as 0 and as 100; the same for all splits and versions of a task."""

_FILE_NAMES = {"ant-maze": "antmaze", "mini-kitchen": "kitchen", "minigrid4rooms": "minigrid-fourrooms"}
"""How D4RL's files call some tasks."""

_ROOT = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
_FILES = {
    "antmaze-umaze-v2": "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed",
    "antmaze-umaze-diverse-v2": "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed",
    "antmaze-medium-play-v2": "ant_maze_v2/Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed",
    "antmaze-medium-diverse-v2": "ant_maze_v2/Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed",
    "antmaze-large-play-v2": "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed",
    "antmaze-large-diverse-v2": "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed",
    "kitchen-complete-v0": "kitchen/mini_kitchen_microwave_kettle_light_slider-v0",
    "kitchen-partial-v0": "kitchen/kitchen_microwave_kettle_light_slider-v0",
    "kitchen-mixed-v0": "kitchen/kitchen_microwave_kettle_bottomburner_light-v0",
}
_MUJOCO = re.compile(
    r"(ant|halfcheetah|hopper|walker2d)-((?:medium|full)-replay|medium-expert|random|medium|expert)-(v[12])"
)
_ADROIT = re.compile(r"(pen|hammer|door|relocate)-(human|cloned|expert)-v1")


def reference_scores(name: str) -> tuple[float, float]:
    """Returns that count as 0 and as 100, for a D4RL name or a Minari id.

    Raises:
        ValueError: the task is not known; the message lists those that are.
    """
    plain = re.sub(r"^(.*://)?(farama-minari/)?(d4rl/|mujoco/)?", "", name.lower())
    plain = re.sub(r"[/_]", "-", plain)
    for file, task in _FILE_NAMES.items():
        plain = re.sub(f"^{file}", task, plain)
    tasks = [task for task in SCORES if plain == task or plain.startswith(task + "-")]
    if not tasks:
        raise ValueError(f"no reference scores for {name!r}; known tasks: {', '.join(SCORES)}")
    return SCORES[max(tasks, key=len)]


def dataset_url(name: str) -> str:
    """Address of a D4RL data set's HDF5 file.

    Raises:
        ValueError: the name is neither one of ours nor in an installed ``d4rl`` package.
    """
    if name in _FILES:
        return f"{_ROOT}{_FILES[name]}.hdf5"
    if match := _MUJOCO.fullmatch(name):
        task, split, version = match.groups()
        return f"{_ROOT}gym_mujoco_{version}/{task}_{split.replace('-', '_')}-{version}.hdf5"
    if _ADROIT.fullmatch(name):
        return f"{_ROOT}hand_dapg_v1/{name}.hdf5"
    table = d4rl_table()
    if table is not None and name in table.DATASET_URLS:
        return table.DATASET_URLS[name]
    raise ValueError(
        f"{name!r} is not a known D4RL data set: give <hopper|halfcheetah|walker2d|ant>-<random|medium|expert|"
        "medium-replay|full-replay|medium-expert>-<v1|v2>, <pen|hammer|door|relocate>-<human|cloned|expert>-v1, "
        f"one of {', '.join(_FILES)}, or install d4rl (pip install lit-methods[d4rl]) for the rest"
    )


def d4rl_table() -> ModuleType | None:
    """The table of the installed ``d4rl`` package, read without importing the package; None if it is not installed."""
    try:
        path = importlib.metadata.distribution("d4rl").locate_file("d4rl/infos.py")
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location("_d4rl_infos", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
