"""The claims of recipes/cbo, with the recipes themselves; by hand with ``-m slow``."""

import re
from pathlib import Path

import pytest

from tests.cli import run_new_process

pytestmark = pytest.mark.slow


def metrics(folder: Path, *args: str) -> dict[str, float]:
    printed = run_new_process(folder, "fit", *args)
    return {name: float(value) for name, value in re.findall(r"^((?:test|val)/\S+) +(-?\d\S*)", printed, re.MULTILINE)}


@pytest.mark.parametrize("seed", [0, 1])
def test_digits_reach_085_without_gradients(seed, tmp_path) -> None:
    found = metrics(tmp_path, "--config", "cbo/digits", f"--seed_everything={seed}", f"--data.seed={seed}")
    assert found["test/accuracy"] >= 0.85


def test_the_canyon_table(tmp_path) -> None:
    found = metrics(tmp_path, "--config", "cbo/illustrations")
    assert found["val/success/cbo"] >= 0.9
    assert found["val/success/hopping_0.7"] >= 0.9
    assert found["val/success/hopping_0.4"] == 0
    assert found["val/success/gradient_descent"] == 0
    assert len(list(tmp_path.rglob("landscape_paths.png"))) == 1


@pytest.mark.parametrize("name", ["rastrigin", "ackley"])
def test_anisotropic_noise_succeeds_where_isotropic_does_not(name, tmp_path) -> None:
    found = metrics(tmp_path, "--config", f"cbo/{name}")
    assert found["val/success/anisotropic_200"] >= 0.5
    assert found["val/success/anisotropic_200"] > found["val/success/isotropic_200"]
