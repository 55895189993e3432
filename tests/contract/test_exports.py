"""Lazy packages export the same names to people, to type checkers and at run time."""

import ast
import importlib

import pytest

from tests.contract.pieces import ROOT

LAZY = sorted(
    path.parent
    for folder in ("lit_methods", "callbacks", "datamodules")
    for path in (ROOT / folder).rglob("__init__.py")
    if "lazy_exports(__name__" in path.read_text() and not path.parent.is_symlink()
)


@pytest.mark.parametrize("folder", LAZY, ids=lambda folder: folder.name)
def test_names_agree(folder) -> None:
    parts = folder.relative_to(ROOT).parts
    package = importlib.import_module(".".join(parts if parts[0] == "lit_methods" else ("lit_methods", *parts)))
    tree = ast.parse((folder / "__init__.py").read_text())
    typed = [
        alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(package.__all__) == sorted(typed) == dir(package)
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
