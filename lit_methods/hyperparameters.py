"""What a LightningModule stores of its constructor arguments."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import nn


def live_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Names of constructor arguments that must not enter the checkpoint's hyperparameters.

    Use it as ``self.save_hyperparameters(ignore=live_arguments(locals()))``. Modules and callables cannot be loaded
    with ``weights_only=True`` and are passed to ``load_from_checkpoint`` again. A module built by the CLI ignores
    nothing: the CLI stores class paths and arguments instead of objects, and ``load_from_checkpoint`` rebuilds them.

    Args:
        arguments: argument name -> value, usually ``locals()`` at the top of ``__init__``.
    """
    if _given_hyperparameters.get() is not None:
        return []
    return [name for name, value in arguments.items() if _is_live(value)]


def _is_live(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_is_live(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_is_live(item) for item in value)
    return isinstance(value, nn.Module) or callable(value)
