"""What a folder's stub or list names can be imported from the folder, and former places warn."""

import ast
import importlib
import sys

import pytest
from torch.optim import Optimizer

from lit_methods import _moved
from tests.contract.pieces import ROOT

FOLDERS = ("lit_methods", "callbacks", "datamodules")
STUBS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.pyi"))


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.parent.name)
def test_stub_agrees_with_the_package(stub) -> None:
    parts = stub.parent.relative_to(ROOT).parts
    package = importlib.import_module(".".join(parts if parts[0] == "lit_methods" else ("lit_methods", *parts)))
    names = [
        alias.asname
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(package.__all__) == sorted(names) == sorted(dir(package))
    for name in names:
        assert getattr(package, name).__name__.rpartition(".")[2] == name


@pytest.mark.parametrize("family", ["mfac", "sso", "cbo", "optimistic"])
def test_every_optimizer_of_a_folder_is_public_in_optim(family) -> None:
    optim = importlib.import_module("lit_methods.optim")
    folder = importlib.import_module(f"lit_methods.optim.{family}")
    for name in folder.__all__:
        piece = getattr(folder, name)
        if isinstance(piece, type) and issubclass(piece, Optimizer):
            assert getattr(optim, name) is piece


@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_a_former_module_warns_and_gives_the_new_one(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} has moved: import from {_moved.MOVED[old]}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(_moved.MOVED[old])
