"""Published machine-learning methods as drop-in PyTorch Lightning software.

Its parts load on first use, so ``import lit_methods`` costs nothing beyond ``import torch``.
"""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

from lit_methods import _moved

try:
    __version__ = version("lit-methods")
except PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "0.0.0"

_moved.warn_on_import()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
