"""MDPO's paper recipes have the paper's settings and start in the environments they name."""

import pytest
import yaml

from tests.cli import run_here
from tests.contract.pieces import ROOT

ENVIRONMENTS = {
    "ant": "Ant-v4",
    "half_cheetah": "HalfCheetah-v4",
    "hopper": "Hopper-v4",
    "humanoid": "Humanoid-v4",
    "humanoid_standup": "HumanoidStandup-v4",
    "walker2d": "Walker2d-v4",
}


SIZES = ("observation_size", "action_size", "observation_shape", "low", "high")


def test_sizes_and_bounds_are_left_to_the_environment():
    recipes = list((ROOT / "recipes" / "mdpo").glob("*.yaml"))
    assert len(recipes) == 18
    for path in recipes:
        model = yaml.safe_load(path.read_text())["model"]["init_args"]
        parts = [part["init_args"] for part in model.values() if isinstance(part, dict) and "init_args" in part]
        assert not {name for part in [model, *parts] for name in part} & set(SIZES), path


def recipe(name: str) -> dict:
    return yaml.safe_load((ROOT / "recipes" / "mdpo" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_on_policy_settings(name):
    config = recipe(f"paper_on_{name}")
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert data["env"] == ENVIRONMENTS[name]
    assert model["policy"]["init_args"]["hidden_features"] == [64, 64]
    optimizer = model["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["inner_steps"], optimizer["max_grad_norm"]) == (3e-4, 10, 0.5)
    assert (model["gamma"], model["gae_lambda"], model["value_clip"]) == (0.99, 0.95, 0.2)
    assert (model["critic_epochs"], model["critic_batch_size"]) == (5, 128)
    horizon = data["num_envs"] * data["rollout_steps"]
    assert horizon == 2048
    assert horizon * data["iterations_per_epoch"] * config["trainer"]["max_epochs"] == pytest.approx(1e7, rel=5e-3)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_off_policy_settings(name):
    config = recipe(f"paper_off_{name}")
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert data["env"] == ENVIRONMENTS[name]
    assert model["actor"]["init_args"]["hidden_features"] == [256, 256]
    assert (data["batch_size"], data["capacity"], data["learning_starts"]) == (256, 10**6, 10**4)
    optimizer = model["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["anchor_interval"], optimizer["inner_steps"]) == (3e-4, 1000, 1)
    assert (model["gamma"], model["tau"], model["entropy_coef"]) == (0.99, 0.005, 0.2)
    steps = data["learning_starts"] + data["updates_per_epoch"] * config["trainer"]["max_epochs"]
    assert steps == 10**6


@pytest.mark.parametrize("name", ["paper_on_humanoid", "paper_off_ant"])
def test_starts(name, tmp_path, monkeypatch):
    few = ["--data.iterations_per_epoch=1", "--data.rollout_steps=8"]
    if "off" in name:
        few = ["--data.updates_per_epoch=2", "--data.learning_starts=5", "--data.capacity=100"]
    limits = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0", "--data.num_eval_episodes=1"]
    run_here(monkeypatch, tmp_path, "fit", "--config", f"mdpo/{name}", *limits, *few)


def test_offline_recipe_runs_up_to_the_missing_data(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gym_mujoco_v2/hopper_medium-v2"):
        run_here(
            monkeypatch, tmp_path, "fit", "--config", "mdpo/paper_offline_hopper_medium",
            "--data.download=false", "--data.dataset_dir=.",
        )  # fmt: skip
