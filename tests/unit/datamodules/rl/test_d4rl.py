import importlib.metadata
import itertools
import os
import re
from types import SimpleNamespace

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch

from lit_methods.datamodules import D4RLDataModule, save_minari, save_transitions_hdf5
from lit_methods.datamodules.rl.d4rl import count_timeouts, shifted_transitions
from lit_methods.datamodules.rl.d4rl_reference import SCORES, d4rl_table, dataset_url, reference_scores
from lit_methods.datamodules.rl.recordings import load_transitions_hdf5


def recording(steps: int = 13) -> dict[str, np.ndarray]:
    """Episodes that end by a terminal, a cut, both at once, and not at all."""
    observations = np.arange(2.0 * steps, dtype=np.float32).reshape(steps, 2)
    terminals, timeouts = np.zeros((2, steps), bool)
    terminals[[3, 9]] = True
    timeouts[[6, 9]] = True
    following = np.roll(observations, -1, 0)
    following[[3, 6, 9, steps - 1]] += 100
    return {
        "observations": observations,
        "actions": np.linspace(-1, 1, steps, dtype=np.float32)[:, None],
        "rewards": np.arange(steps, dtype=np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
        "next_observations": following,
    }


def loop_over_rows(arrays, terminate_on_end=False, max_episode_steps=None):
    """``qlearning_dataset`` row by row, with the counter as it should be."""
    rows, step = [], 0
    for i in range(len(arrays["rewards"]) - 1):
        final = arrays["timeouts"][i] if "timeouts" in arrays else step == max_episode_steps - 1
        if final and not terminate_on_end:
            step = 0
            continue
        rows.append(
            (arrays["observations"][i], arrays["actions"][i], arrays["rewards"][i], arrays["observations"][i + 1],
             arrays["terminals"][i])
        )  # fmt: skip
        step = 0 if final or arrays["terminals"][i] else step + 1
    return [np.array(column) for column in zip(*rows, strict=True)]


def packed(data: D4RLDataModule) -> list[np.ndarray]:
    data.setup("fit")
    observations, actions, rewards, following, terminations = data.transitions.rows.split(data.transitions.widths, 1)
    return [x.numpy() for x in (observations, actions, rewards[:, 0], following, terminations[:, 0])]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "hopper_medium-v2.hdf5"
    save_transitions_hdf5(path, recording(), {"algorithm": "by hand"})
    return path


@pytest.mark.parametrize("terminate_on_end", [False, True])
def test_shifted_transitions_are_those_of_the_loop(file, terminate_on_end):
    found = packed(D4RLDataModule(file, terminate_on_end=terminate_on_end))
    expected = loop_over_rows(recording(), terminate_on_end)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y.astype(np.float32))
    assert len(found[0]) == (12 if terminate_on_end else 10)


def test_a_large_recording_against_the_loop():
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(5000, 3)).astype(np.float32),
        "actions": rng.normal(size=(5000, 1)).astype(np.float32),
        "rewards": rng.normal(size=5000).astype(np.float32),
        "terminals": rng.random(5000) < 0.01,
        "timeouts": rng.random(5000) < 0.01,
    }
    found = shifted_transitions(arrays)
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    for name, expected in zip(names, loop_over_rows(arrays), strict=True):
        np.testing.assert_array_equal(found[name], expected)
    del arrays["timeouts"]
    counted = shifted_transitions({**arrays, "timeouts": count_timeouts(arrays["terminals"], 70)})
    for name, expected in zip(names, loop_over_rows(arrays, max_episode_steps=70), strict=True):
        np.testing.assert_array_equal(counted[name], expected)


def test_counted_cuts_do_not_drift():
    terminals = np.zeros(52, bool)
    lengths = [7, 10, 4, 10, 1, 10, 10]
    for end, cut in zip(np.cumsum(lengths) - 1, [False, True, False, True, False, True, True], strict=True):
        terminals[end] = not cut
    assert np.flatnonzero(count_timeouts(terminals, 10)).tolist() == [16, 30, 41, 51]


def test_stored_next_observations_keep_every_row(file):
    observations, _, rewards, following, terminations = packed(D4RLDataModule(file, next_observations="stored"))
    r = recording()
    np.testing.assert_array_equal(following, r["next_observations"])
    np.testing.assert_array_equal(terminations, r["terminals"])
    assert len(observations) == len(rewards) == 13


def test_recordings_come_back_as_they_were(tmp_path):
    path = tmp_path / "x.hdf5"
    arrays = {**recording(), "infos/qpos": np.arange(13.0), "numbers": np.arange(13)}
    save_transitions_hdf5(path, arrays, {"author": "me"})
    back = load_transitions_hdf5(path)
    assert set(back) == set(arrays)
    for name, values in arrays.items():
        np.testing.assert_array_equal(back[name], values)
    assert back["infos/qpos"].dtype == np.float32
    with h5py.File(path) as f:
        assert f["metadata/author"][()].decode() == "me"


def test_old_layouts(tmp_path):
    path = tmp_path / "x.hdf5"
    r = recording()
    with h5py.File(path, "w") as f:
        f["observations"], f["actions"] = r["observations"].astype(np.float64), r["actions"]
        f["rewards"], f["terminals"] = r["rewards"][:, None], r["terminals"].astype(np.uint8)[:, None]
        f["metadata/policy/fc0/weight"] = np.ones((4, 4))
    back = load_transitions_hdf5(path)
    assert back["observations"].dtype == np.float32
    assert back["terminals"].dtype == bool
    np.testing.assert_array_equal(back["rewards"], r["rewards"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"actions": None}, KeyError, "has no 'actions'"),
        ({"rewards": np.zeros(5)}, ValueError, "rewards has 5 steps, observations have 13"),
        ({"rewards": np.full(13, np.nan)}, ValueError, "rewards must be finite, which step 0 is not"),
        (
            {"observations": np.diag([1.0] * 12 + [np.inf])},
            ValueError,
            "observations must be finite, which step 12 is not",
        ),
        ({"rewards": np.full(13, b"1.0")}, ValueError, "rewards must be numbers, got"),
        ({"rewards": np.ones((13, 2))}, ValueError, r"rewards must be one number for each step, got shape \(13, 2\)"),
        ({name: values[:0] for name, values in recording().items()}, ValueError, "holds no steps"),
    ],
)
def test_broken_files(tmp_path, change, error, message):
    arrays = {k: v for k, v in {**recording(), **change}.items() if v is not None}
    with pytest.raises(error, match=message):
        save_transitions_hdf5(tmp_path / "x.hdf5", arrays)
    with h5py.File(tmp_path / "y.hdf5", "w") as f:
        for name, values in arrays.items():
            f[name] = values
    with pytest.raises(error, match=message):
        D4RLDataModule(tmp_path / "y.hdf5").setup("fit")
    assert not (tmp_path / "x.hdf5").exists()


def test_warns_when_nothing_ends(tmp_path):
    arrays = recording() | {"terminals": np.zeros(13, bool), "timeouts": np.zeros(13, bool)}
    save_transitions_hdf5(tmp_path / "x.hdf5", arrays)
    with pytest.warns(UserWarning, match="no episode ends"):
        D4RLDataModule(tmp_path / "x.hdf5").setup("fit")


def test_whole_episodes(file):
    data = D4RLDataModule(file, kind="episodes", batch_size=40, steps_per_epoch=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert {int(n) for n in batch.mask.sum(1)} == {4, 3}
    longest = batch.mask.sum(1) == 4
    assert batch.rewards[longest][0].tolist() == [0, 1, 2, 3]
    assert batch.returns_to_go[longest][0].tolist() == [6, 6, 5, 3]
    assert batch.terminations[longest][0].tolist() == [0, 0, 0, 1]
    assert not batch.observations[~batch.mask].any()
    assert data.num_transitions == 10  # the unfinished tail is left out


def test_preprocessing(file):
    plain = packed(D4RLDataModule(file))
    data = D4RLDataModule(file, normalize_observations=True, reward_scale="return_range", reward_shift=-1.0)
    observations, _, rewards, following, _ = packed(data)
    r = recording()
    mean, std = r["observations"].mean(0), r["observations"].std(0) + 1e-3
    np.testing.assert_allclose(observations, (plain[0] - mean) / std, rtol=1e-5)
    np.testing.assert_allclose(following, (plain[3] - mean) / std, rtol=1e-5)
    returns = [6, 15, 24, 33]  # the unfinished episode counts
    np.testing.assert_allclose(rewards, plain[2] * 1000 / (max(returns) - min(returns)) - 1, rtol=1e-5)


def test_batches_are_rows_of_the_data_set(file):
    data = D4RLDataModule(file, batch_size=64, steps_per_epoch=3)
    rows = np.concatenate([x.reshape(10, -1) for x in packed(data)], 1)
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    for b in batches:
        columns = [b.observations, b.actions, b.rewards[:, None], b.next_observations, b.terminations[:, None]]
        assert {tuple(row) for row in torch.cat(columns, 1).tolist()} <= {tuple(row) for row in rows.tolist()}
    assert not torch.equal(batches[0].observations, batches[1].observations)


def test_ranks_draw_their_own_batches(file):
    seen = []
    for rank in range(2):
        data = D4RLDataModule(file, batch_size=8)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        data.setup("fit")
        seen.append(next(iter(data.train_dataloader())))
    assert not torch.equal(seen[0].observations, seen[1].observations)


def record_pendulum(num_episodes: int = 3) -> list[dict[str, np.ndarray]]:
    env, episodes = gym.make("Pendulum-v1", max_episode_steps=20), []
    env.action_space.seed(0)
    for seed in range(num_episodes):
        observation, _ = env.reset(seed=seed)
        episode = {"observations": [observation], "actions": [], "rewards": [], "terminations": [], "truncations": []}
        done = False
        while not done:
            action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            for name, value in zip(episode, (observation, action, reward, terminated, truncated), strict=True):
                episode[name].append(value)
        episodes.append({name: np.array(values) for name, values in episode.items()})
    return episodes


def test_minari_there_and_back(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episodes = record_pendulum()
    env = gym.make("Pendulum-v1")
    saved = save_minari("pendulum/random-v0", episodes, env, ref_min_score=-1000.0, ref_max_score=0.0)
    assert saved.total_steps == 60
    for dataset in ("pendulum/random-v0", str(tmp_path / "pendulum" / "random-v0")):
        data = D4RLDataModule(dataset, eval_env="Pendulum-v1", num_eval_episodes=1)
        observations, actions, rewards, following, terminations = packed(data)
        np.testing.assert_array_equal(observations, np.concatenate([e["observations"][:-1] for e in episodes]))
        np.testing.assert_array_equal(following, np.concatenate([e["observations"][1:] for e in episodes]))
        np.testing.assert_array_equal(actions, np.concatenate([e["actions"] for e in episodes]))
        np.testing.assert_array_equal(rewards, np.concatenate([e["rewards"] for e in episodes]).astype(np.float32))
        assert not terminations.any()
        assert float(data.normalized_score(-250.0)) == 75
    broken = [{**episodes[0], "rewards": episodes[0]["rewards"][:-1]}]
    with pytest.raises(ValueError, match="episode 0: rewards has 19 entries, not 20"):
        save_minari("pendulum/broken-v0", broken, env)
    assert list(minari.list_local_datasets()) == ["pendulum/random-v0"]


def test_evaluation_sees_normalised_observations(file, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    save_minari("pendulum/random-v0", record_pendulum(), gym.make("Pendulum-v1"))
    data = D4RLDataModule(
        "pendulum/random-v0", normalize_observations=True, eval_env="Pendulum-v1", num_eval_episodes=2
    )
    data.setup("fit")
    seen = []

    class Agent:
        device = torch.device("cpu")

        def act(self, observations, deterministic=False):
            assert deterministic
            seen.append(observations)
            return torch.zeros(len(observations), 1), None

    data.trainer = SimpleNamespace(lightning_module=Agent(), global_rank=0, world_size=1)
    episodes = next(iter(data.val_dataloader()))
    assert episodes.lengths.tolist() == [200, 200]
    raw = seen[0] * data.observation_std + data.observation_mean
    torch.testing.assert_close(raw[:, :2].square().sum(1), torch.ones(2))  # cos² + sin²
    assert data.make_eval_env(3).num_envs == 3
    plain = D4RLDataModule(file)
    assert plain.val_dataloader() == []
    with pytest.raises(ValueError, match="eval_env=None"):
        plain.make_eval_env()


def test_reference_scores():
    hopper = D4RLDataModule("hopper-medium-v2")
    assert float(hopper.normalized_score(3234.3)) == pytest.approx(100)
    assert float(hopper.normalized_score(-20.272305)) == pytest.approx(0)
    assert reference_scores("D4RL/pen/human-v2") == SCORES["pen"]
    assert reference_scores("hf://farama-minari/D4RL/door/human-v2") == SCORES["door"]
    assert reference_scores("mujoco/hopper/medium-v0") == SCORES["hopper"]
    assert reference_scores("antmaze-large-play-v2") == SCORES["antmaze"]
    assert reference_scores("maze2d-umaze-dense-v1") == SCORES["maze2d-umaze-dense"]
    cheetah = D4RLDataModule("halfcheetah-medium-replay-v2").normalized_score(np.array([5000.0]))
    assert cheetah == pytest.approx([42.53003])
    with pytest.raises(ValueError, match="no reference scores for 'swimmer-v0'; known tasks: ant, antmaze"):
        reference_scores("swimmer-v0")


def test_missing_data_sets_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = D4RLDataModule("hopper-medium-v2", dataset_dir=tmp_path)
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"hopper_medium-v2.hdf5 is not there.*gym_mujoco_v2/hopper_medium-v2"):
        data.setup("fit")
    with pytest.raises(FileNotFoundError, match="minari download mujoco/hopper/medium-v0"):
        D4RLDataModule("mujoco/hopper/medium-v0").setup("fit")
    with pytest.raises(FileNotFoundError, match=r"mine.hdf5 is not there"):
        D4RLDataModule(tmp_path / "mine.hdf5").setup("fit")
    with pytest.raises(
        ValueError, match=r"must be a .hdf5 file or a Minari folder, a Minari id with a slash, or a D4RL"
    ):
        D4RLDataModule("hopper")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "cache" / "pen-human-v1.hdf5"))):
        D4RLDataModule("pen-human-v1").setup("fit")


def test_files_without_next_observations_refuse_stored(tmp_path):
    arrays = recording()
    del arrays["next_observations"]
    save_transitions_hdf5(tmp_path / "x.hdf5", arrays)
    with pytest.raises(ValueError, match="has no next_observations: use next_observations='shift'"):
        D4RLDataModule(tmp_path / "x.hdf5", next_observations="stored").setup("fit")


def test_tables_agree_with_the_package(monkeypatch):
    """Against the table in ``d4rl`` 1.1, when it is installed (its code is not run)."""
    table = d4rl_table()
    if table is None:
        assert os.environ.get("D4RL_INSTALLED") is None
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution("d4rl")
        pytest.skip("needs d4rl")
    for name, low in table.REF_MIN_SCORE.items():
        if not name.startswith("bullet") and "eval" not in name:
            assert reference_scores(name) == (low, table.REF_MAX_SCORE[name]), name
    names = [n for n in table.DATASET_URLS if dataset_url(n) == table.DATASET_URLS[n]]
    assert len(names) == len(table.DATASET_URLS)


def test_mujoco_names():
    tasks, splits = ("ant", "halfcheetah", "hopper", "walker2d"), ("random", "medium", "medium-replay", "medium-expert")
    for task, split, version in itertools.product(tasks, splits, ("v1", "v2")):
        url = dataset_url(f"{task}-{split}-{version}")
        assert url.endswith(f"gym_mujoco_{version}/{task}_{split.replace('-', '_')}-{version}.hdf5")


def test_single_values_belong_to_no_step(tmp_path):
    path = tmp_path / "x.hdf5"
    save_transitions_hdf5(path, recording())
    with h5py.File(path, "a") as f:
        f["ref_min_score"], f["note"] = 3.0, "text"
    assert set(load_transitions_hdf5(path)) == set(recording())
    with h5py.File(path, "a") as f:
        del f["rewards"]
        f["rewards"] = 1.0
    with pytest.raises(ValueError, match=r"rewards must have an entry for each step, got the single value 1"):
        load_transitions_hdf5(path)


def test_damaged_and_exploding_files_are_named(file, tmp_path, monkeypatch):
    whole = file.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file.name} is damaged or not an HDF5 file"):
            D4RLDataModule(file).setup("fit")
    monkeypatch.setattr("lit_methods.datamodules.reading._ALWAYS", 10_000)
    with h5py.File(file, "w") as f:
        f.create_dataset("observations", (10**9, 3), chunks=(1000, 3), compression="gzip")  # nothing is stored
    with pytest.raises(ValueError, match=r"observations would unpack from \d+ to 12000000000 bytes"):
        D4RLDataModule(file).setup("fit")


@pytest.mark.parametrize("kind", ["transitions", "episodes"])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
def test_observations_of_any_shape_and_type_are_standardised_number_by_number(dtype, kind, tmp_path):
    observations = np.random.default_rng(0).integers(0, 200, (13, 2, 3)).astype(dtype)
    arrays = {name: values for name, values in recording().items() if name != "next_observations"}
    save_transitions_hdf5(tmp_path / "x.hdf5", arrays | {"observations": observations})
    data = D4RLDataModule(tmp_path / "x.hdf5", batch_size=5, kind=kind, normalize_observations=True)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.observations.dtype == torch.float32
    assert batch.observations.shape[-2:] == (2, 3)
    expected = (observations - observations.astype("f4").mean(0)) / (observations.astype("f4").std(0) + 1e-3)
    found = batch.observations.flatten(0, -3) if kind == "episodes" else batch.observations
    mask = batch.mask.flatten() if kind == "episodes" else torch.ones(len(found), dtype=torch.bool)
    for row in found[mask].numpy():
        assert any(np.allclose(row, want, atol=1e-4) for want in expected)
    assert (data.observation_size, tuple(data.observation_mean.shape)) == (6, (2, 3))


def test_images_and_discrete_actions_keep_shape_and_type(tmp_path):
    arrays = recording() | {"actions": np.arange(13) % 4, "observations": np.ones((13, 4, 4, 3), np.uint8)}
    arrays["next_observations"] = 255 * arrays["observations"]
    save_transitions_hdf5(tmp_path / "x.hdf5", arrays)
    data = D4RLDataModule(tmp_path / "x.hdf5", batch_size=5, next_observations="stored")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.observations.shape == batch.next_observations.shape == (5, 4, 4, 3)
    assert float(batch.next_observations.max()) == 255
    assert (batch.actions.dtype, batch.actions.shape) == (torch.int64, (5,))
    assert data.spaces == ((4, 4, 3), 4, (), (), True)


def test_spaces_are_those_of_the_evaluation_environment_or_the_data(file, tmp_path):
    data = D4RLDataModule(file)
    data.setup("fit")
    assert data.spaces == ((2,), 0, (-1.0,), (1.0,), True)
    with pytest.raises(ValueError, match=r"of shape \(3,\) and 1 .*, as eval_env=Pendulum-v1 has, got \(2,\) and 1"):
        D4RLDataModule(file, eval_env="Pendulum-v1").setup("fit")
    arrays = recording()
    for name in ("observations", "next_observations"):
        arrays[name] = arrays[name][:, [0, 1, 1]]
    save_transitions_hdf5(tmp_path / "p.hdf5", arrays)
    data = D4RLDataModule(tmp_path / "p.hdf5", eval_env="Pendulum-v1")
    data.setup("fit")
    assert data.spaces == ((3,), 0, (-2.0,), (2.0,), False)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed", "antmaze"),
        ("antmaze-umaze-v2", "antmaze"),
        ("ant_medium-v2", "ant"),
        ("mini_kitchen_microwave_kettle_light_slider-v0", "kitchen"),
        ("minigrid4rooms-v0", "minigrid-fourrooms"),
        ("maze2d-umaze-sparse-v1", "maze2d-umaze"),
        ("D4RL/pen/human-v2", "pen"),
        ("D4RL/antmaze/umaze-v1", "antmaze"),
        ("mujoco/hopper/medium-v0", "hopper"),
        ("hf://farama-minari/D4RL/door/human-v2", "door"),
    ],
)
def test_scores_by_file_name_and_by_id(name, task):
    assert reference_scores(name) == SCORES[task]
    low, high = SCORES[task]
    dataset = name if "/" in name else f"folder/{name}.hdf5"
    assert float(D4RLDataModule(dataset).normalized_score(low + 0.7 * (high - low))) == pytest.approx(70)


def test_observations_of_a_single_number(tmp_path):
    arrays = recording() | {"observations": np.arange(13.0), "next_observations": np.arange(13.0) + 1}
    save_transitions_hdf5(tmp_path / "x.hdf5", arrays)
    data = D4RLDataModule(tmp_path / "x.hdf5", batch_size=5, next_observations="stored", normalize_observations=True)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).observations.shape == (5, 1)
    assert data.spaces.observation_shape == (1,)
