"""Strings as shorthand for small objects, and what their numbers have in common."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any


def named(argument: str, value: Any, table: Mapping[str, Callable[[], Any]], kind: type) -> Any:
    """The object that a name stands for; an object of that kind is returned as it is.

    Raises:
        ValueError: naming the argument, what it was and the names there are.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in table:
        return table[value]()
    raise ValueError(f"{argument} must be one of {sorted(table)} or a {kind.__name__}, got {value!r}")


def check_finite_fields(settings: Any) -> None:
    """Raise unless all numbers of a dataclass are finite."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{field.name} must be finite, got {value}")
