"""Every packaged recipe is documented, parses, and runs (small and slow ones, with tiny limits)."""

from pathlib import Path

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


@pytest.mark.parametrize("name", [n for n in NAMES if not n.rpartition("/")[2].startswith("paper_")])
def test_recipe_runs_and_resumes(name: str, tmp_path: Path) -> None:
    assert name in RECIPES, f"recipe {name} has no case in tests/contract/cases/"
    case = RECIPES[name]
    case.prepare(tmp_path)
    config = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "lit_methods.callbacks.LastCheckpoint":
            callback.pop("init_args", None)  # every epoch; recipes choose longer intervals for epochs of a second
    compare_resumed_runs(tmp_path, config, case.overrides)


def test_every_case_belongs_to_a_recipe() -> None:
    assert set(RECIPES) <= set(NAMES)


@pytest.mark.parametrize("folder", sorted({n.partition("/")[0] for n in NAMES}))
def test_readme_has_the_result_table(folder: str) -> None:
    text = (ROOT / "recipes" / folder / "README.md").read_text().lower()
    assert "| paper" in text, "no table with a column 'paper'"
    assert "ours" in text, "no table with a column 'ours'"
