"""Strings as shorthand for small objects."""

from collections.abc import Callable, Mapping
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
