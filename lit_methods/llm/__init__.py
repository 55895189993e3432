"""Fine-tuning language models: Nash learning from preferences, judges, supervised fine-tuning."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    pass

__all__: list[str] = []

__getattr__, __dir__ = lazy_exports(__name__, {})
