"""Find every public piece: each class in the ``__all__`` of a lit_methods module, and each packaged recipe."""

import importlib
import pkgutil
import types
import typing
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.optim import Optimizer

import lit_methods

ROOT = Path(__file__).parents[2]
KINDS = {
    "optimizer": Optimizer,
    "module": LightningModule,
    "callback": Callback,
    "datamodule": LightningDataModule,
}


@cache
def public_objects() -> dict[str, object]:
    """Import path -> object, each object once, under its shortest path."""
    found: dict[int, tuple[str, object]] = {}
    for info in sorted(pkgutil.walk_packages(lit_methods.__path__, "lit_methods."), key=lambda info: len(info.name)):
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", []):
            found.setdefault(id(getattr(module, name)), (f"{info.name}.{name}", getattr(module, name)))
    return dict(found.values())


def kind_of(obj: object) -> str:
    """``optimizer``, ``module``, ``callback``, ``datamodule`` or ``other``."""
    return next((k for k, base in KINDS.items() if isinstance(obj, type) and issubclass(obj, base)), "other")


def pieces(kind: str) -> list[str]:
    """Import paths of the public pieces of one kind."""
    return [path for path, obj in public_objects().items() if kind_of(obj) == kind]


def real_arguments(kind: type) -> dict[str, bool]:
    """Name -> whether it is a sequence, of the constructor's arguments that are real numbers."""
    found = {}
    for name, hint in typing.get_type_hints(kind.__init__).items():
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
        if any(typing.get_origin(k) in (tuple, list, Sequence) and float in typing.get_args(k) for k in kinds):
            found[name] = True
        elif float in kinds:
            found[name] = False
    return found


def recipe_names() -> list[str]:
    """Packaged recipes, as ``<method>/<name>``."""
    folder = ROOT / "recipes"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml"))
