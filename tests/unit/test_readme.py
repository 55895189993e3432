import re

import pytest
import torch

from tests.contract.pieces import ROOT, recipe_names

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    accuracies = []
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), {})
        accuracies += [float(a) for a in re.findall(r"tensor\((0\.\d+)\)", capsys.readouterr().out)]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.9


def test_quickstart_needs_no_lightning() -> None:
    assert "lightning" not in BLOCKS[0]
    assert "lit_methods.optim" in BLOCKS[0]


@pytest.mark.parametrize("marker", ["main", "test"])
def test_the_two_commands_are_one_line_each(marker) -> None:
    (command,) = re.findall(rf"<!-- command: {marker} -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert command.count("\n") == 1
    assert "-c constraints.txt" in command


def test_method_table_names_every_recipe_folder_and_22_methods() -> None:
    table = README.partition("## Methods")[2].partition("Shared pieces")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| method")]
    assert len(rows) == 22
    for folder in {name.partition("/")[0] for name in recipe_names()}:
        assert f"recipes/{folder}/README.md" in table
