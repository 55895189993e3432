"""Published machine-learning methods as drop-in PyTorch Lightning software.

Submodules load on first use, so ``import lit_methods`` costs nothing beyond ``import torch``.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

try:
    __version__ = version("lit-methods")
except PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "0.0.0"

__all__ = [
    "callbacks",
    "datamodules",
    "games",
    "llm",
    "metrics",
    "nets",
    "online",
    "optim",
    "recipes",
    "rl",
    "sensing",
    "supervised",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
