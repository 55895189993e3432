"""Bit-for-bit comparison of nested states."""

from collections.abc import Mapping
from typing import Any

import torch


def assert_same(actual: Any, expected: Any, where: str = "state") -> None:
    """Fail unless both are equal to the last bit, naming the first place where they differ."""
    assert type(actual) is type(expected), f"{where}: {type(actual)} is not {type(expected)}"
    if isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), f"{where}: dtype or shape differs"
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num()), f"{where} differs"
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected), f"{where}: keys {list(actual)} are not {list(expected)}"
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{where}: length {len(actual)} is not {len(expected)}"
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert actual == expected, f"{where}: {actual!r} is not {expected!r}"
