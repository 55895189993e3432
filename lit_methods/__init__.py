"""Published machine-learning methods as drop-in PyTorch Lightning software.

Submodules load on first use, so ``import lit_methods`` costs nothing beyond ``import torch``."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:

__all__ = []

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
    },
)
