"""Variational inference."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.vi.ease import EASE
    from lit_methods.vi.mult_vae import MultDAE, MultVAE

__all__ = ["EASE", "MultDAE", "MultVAE"]

__getattr__, __dir__ = lazy_exports(__name__, {"EASE": "ease", "MultDAE": "mult_vae", "MultVAE": "mult_vae"})
