"""What a LightningModule stores of its constructor arguments."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from typing import Any

from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import nn


def live_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Names of constructor arguments that must not enter the checkpoint's hyperparameters.

    Use it as ``self.save_hyperparameters(ignore=live_arguments(locals()))``. Modules, callables and settings objects
    cannot be loaded with ``weights_only=True`` and are passed to ``load_from_checkpoint`` again. A module built by the
    CLI ignores nothing: the CLI stores class paths and arguments instead of objects, and ``load_from_checkpoint``
    rebuilds them.

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
    return isinstance(value, nn.Module) or is_dataclass(value) or callable(value)


def as_fields(settings: Any) -> dict[str, Any]:
    """Fields of a settings object as plain data, which a checkpoint may hold; ``None`` stands for the defaults."""
    return asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else dict(settings or {})


def move_arguments(
    owner: str, old: dict[str, Any], moved: Mapping[str, str], settings: Mapping[str, dict[str, Any]]
) -> None:
    """Put arguments under their former names where they belong now, with a warning, and empty ``old``.

    Args:
        owner: name of the class, for messages.
        old: what its constructor got besides the present arguments.
        moved: former name -> ``"<argument>.<field>"``.
        settings: present argument -> its fields; changed in place.

    Raises:
        TypeError: for a name that never was an argument, with close matches.
    """
    while old:
        name, value = old.popitem()
        if name not in moved:
            names = [*settings, *(path.partition(".")[2] for path in moved.values())]
            close = get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{owner} has no argument {name!r}{hint}")
        argument, _, field = moved[name].partition(".")
        kind = "MirrorProx" if field == "inner_steps" else "Prox" if argument == "mode" else argument.capitalize()
        warnings.warn(
            f"{owner}: {name} has moved: write {argument}={kind}({field}={value!r})", FutureWarning, stacklevel=3
        )
        settings[argument][field] = value
