"""Whatever a configuration holds, it ends in a run or in one line."""

import copy
import random
from typing import Any

import pytest
import yaml

from lit_methods.cli import LitMethodsCLI
from tests.contract.pieces import ROOT, recipe_names

NAMES = [name for name in recipe_names() if not name.startswith("nash_mp/paper_")]  # those fetch their model
STRANGE = [
    -1, 0, 2**70, 1.5, float("nan"), float("inf"), True, None, "", "abc", "1e-3", "\x7f", "ä" * 50, "os.system",
    "lit_methods.nets.MLP", [], [1], [[]], ["a", None], {}, {"a": 1}, {"class_path": "torch.nn.Linear"},
    {"class_path": 3}, {"class_path": "nowhere.Nothing"}, {"init_args": {}}, {1: 2},
]  # fmt: skip


class Builds(LitMethodsCLI):
    """Parses and builds everything, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def mutate(config: dict[str, Any], rng: random.Random) -> str:
    """Change one to three places: a key is lost, misspelt or doubled, or a value replaced; returns what was done."""
    done = []
    for _ in range(rng.randint(1, 3)):
        places = list(_places(config))
        container, key = rng.choice(places)
        kind = rng.choice(["lose", "misspell", "double", "replace", "replace", "replace"])
        done.append(f"{kind} {key!r}")
        if kind == "replace":
            container[key] = copy.deepcopy(rng.choice(STRANGE))
        elif kind == "double":
            container[key] = [container[key], copy.deepcopy(container[key])]
        else:
            value = container.pop(key)
            if kind == "misspell" and isinstance(container, dict):
                container[f"{key}x"] = value
    return ", ".join(done)


def _places(node: Any) -> Any:
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    for key, value in items:
        yield node, key
        yield from _places(value)


def check(seed: int, tmp_path, monkeypatch, capsys) -> None:
    rng = random.Random(seed)
    name = rng.choice(NAMES)
    config = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    what = f"seed {seed}: {name}, {mutate(config, rng)}"
    (tmp_path / "mutated.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lit-methods", "fit", "--config", "mutated.yaml"])
    try:
        Builds()
    except SystemExit as exit_:
        assert exit_.code == 2, what
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("lit-methods: error: "), f"{what}: {last}"
    except Exception as error:
        raise AssertionError(what) from error


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", range(2))
def test_mutated_recipes(block, tmp_path, monkeypatch, capsys) -> None:
    for seed in range(20 * block, 20 * block + 20):
        check(seed, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(40, 600))
def test_many_more(seed, tmp_path, monkeypatch, capsys) -> None:
    check(seed, tmp_path, monkeypatch, capsys)
