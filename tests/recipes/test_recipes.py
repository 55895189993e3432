"""Every packaged recipe is documented, parses, and runs (with tiny limits; slow ones with the slow tests)."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.contract.cases import RECIPES
from tests.contract.pieces import ROOT, recipe_names
from tests.contract.resume import compare_resumed_runs
from tests.recipes import recipe_checks as checks

NAMES = recipe_names()


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_documented_and_parses(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / "recipes" / f"{name}.yaml"
    checks.check_header_is_complete(recipe)
    checks.check_readme_presents_it(recipe)
    checks.check_resumes_exactly_by_its_settings(recipe)
    checks.check_parses_against_current_signatures(recipe, monkeypatch, capsys)


def runnable() -> list[Any]:
    """Small recipes, and slow ones for the tests that are marked so."""
    kinds = {n: re.search(r"kind: (\w+)", (ROOT / "recipes" / f"{n}.yaml").read_text()) for n in NAMES}
    named = {n: kind.group(1) for n, kind in kinds.items() if kind}
    return [pytest.param(n, marks=[pytest.mark.slow] * (named[n] == "slow")) for n in named if named[n] != "paper"]


@pytest.mark.parametrize("name", runnable())
def test_recipe_runs_and_resumes(name: str, tmp_path: Path) -> None:
    assert name in RECIPES, f"recipe {name} has no case in tests/contract/cases/"
    case = RECIPES[name]
    case.prepare(tmp_path)
    config = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    for callback in config["trainer"]["callbacks"]:
        kind = callback["class_path"].rpartition(".")[2]
        if kind == "LastCheckpoint":
            callback.pop("init_args", None)  # every epoch; recipes choose longer intervals for epochs of a second
        if kind in case.callbacks:
            callback["init_args"] |= case.callbacks[kind]
    compare_resumed_runs(tmp_path, config, case.overrides)


def test_every_case_belongs_to_a_recipe() -> None:
    assert set(RECIPES) <= set(NAMES)


@pytest.mark.parametrize("folder", sorted({n.partition("/")[0] for n in NAMES}))
def test_readme_has_the_result_table(folder: str) -> None:
    text = (ROOT / "recipes" / folder / "README.md").read_text().lower()
    assert "| paper" in text, "no table with a column 'paper'"
    assert "ours" in text, "no table with a column 'ours'"
