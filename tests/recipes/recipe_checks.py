"""What every packaged recipe promises."""

import re
from pathlib import Path

import pytest

from lit_methods.cli import main

HEADER = ("method", "kind", "shows", "paper", "expect", "minutes", "extra")
KINDS = ("small", "slow", "paper")


def header(recipe: Path) -> dict[str, str]:
    """The ``# key: value`` lines that open the file."""
    return dict(re.findall(r"^# ([a-z]+): (.*)$", recipe.read_text().split("\n\n", 1)[0], re.MULTILINE))


def check_header_is_complete(recipe: Path) -> None:
    found = header(recipe)
    assert tuple(found) == HEADER, f"{recipe}: header keys {list(found)} are not {list(HEADER)}"
    assert found["kind"] in KINDS, f"{recipe}: kind is {found['kind']!r}, not one of {KINDS}"
    assert all(found.values()), f"{recipe}: empty header line"


def check_readme_presents_it(recipe: Path) -> None:
    readme = recipe.parent / "README.md"
    assert readme.is_file(), f"{recipe.parent} has no README.md"
    name = f"{recipe.parent.name}/{recipe.stem}"
    assert name in readme.read_text(), f"{readme} does not mention {name}"


def check_parses_against_current_signatures(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lit-methods", "fit", "--config", str(recipe), "--print_config"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0, capsys.readouterr().err
    assert "class_path" in capsys.readouterr().out


def check_resumes_exactly_by_its_settings(recipe: Path) -> None:
    text = recipe.read_text()
    assert "use_distributed_sampler: false" in text, f"{recipe} does not set trainer.use_distributed_sampler: false"
    assert "lit_methods.callbacks.ExactResume" in text, f"{recipe} has no ExactResume callback"
