"""One case per public piece: how to build it, what it must refuse, and why a check does not apply.

A file per family holds ``OPTIMIZERS``, ``MODULES``, ``DATAMODULES``, ``CALLBACKS`` and ``RECIPES``, those it has.
"""

import importlib
import pkgutil
from typing import Any

from tests.contract.cases.kinds import CallbackCase, DataModuleCase, ModuleCase, OptimizerCase, RecipeCase


def join(tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The entries of every family's table; refuses a piece that has cases in two."""
    joined: dict[str, Any] = {}
    for family, table in tables.items():
        if twice := joined.keys() & table.keys():
            raise ValueError(f"{sorted(twice)} in tests/contract/cases/{family}.py have a case in another file too")
        joined |= table
    return joined


_FAMILIES = {info.name: importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)}


def _all(table: str) -> dict[str, Any]:
    return join({name: getattr(family, table, {}) for name, family in _FAMILIES.items()})


OPTIMIZERS: dict[str, OptimizerCase] = _all("OPTIMIZERS")
MODULES: dict[str, ModuleCase] = _all("MODULES")
DATAMODULES: dict[str, DataModuleCase] = _all("DATAMODULES")
CALLBACKS: dict[str, CallbackCase] = _all("CALLBACKS")
RECIPES: dict[str, RecipeCase] = _all("RECIPES")
