from typing import Any

import pytest
import yaml

from lit_methods.masking import mask_secrets


@pytest.mark.parametrize(
    ("value", "masked"),
    [
        ({"Authorization": "Bearer abc"}, {"Authorization": "***"}),
        ({"a": [{"X-Api-Key": "abc", "n": 3}]}, {"a": [{"X-Api-Key": "***", "n": 3}]}),
        ({"token": "abc", "my_secret": "x", "password": "y"}, {"token": "***", "my_secret": "***", "password": "***"}),
        ("Bearer abc", "***"),
        ("key hf_abcdefghijklmnopqrst here", "key *** here"),
        ("https://me:pw@host/judge?api_key=abc&n=3", "https://***@host/judge?api_key=***&n=3"),
        ("https://host/judge?key=abc", "https://host/judge?key=***"),
    ],
)
def test_what_looks_like_a_secret_is_masked(value: Any, masked: Any) -> None:
    assert mask_secrets(value) == masked


@pytest.mark.parametrize(
    "value",
    [
        {"token_env": "MY_TOKEN", "headers_from_env": {"Authorization ": "MY"}, "tokenizer": "folder", "token": None},
        {"eos_token": "<eos>", "max_new_tokens": 3, "pad_token": "<pad>", "key": "prompt", "monkey": "x"},
        ["Basic arithmetic in one sentence", "Bearer of good news", "https://host/a@b?n=1", "name@host"],
    ],
)
def test_everything_else_stays(value: Any) -> None:
    assert mask_secrets(value) == value
    assert mask_secrets(yaml.safe_load(yaml.safe_dump(value))) == value
