"""Keeping secrets out of what is written: configurations, hyperparameters, checkpoints and messages."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_SECRET_NAME = re.compile(
    r"(^|[-_.])(authorization|api[-_]?key|access[-_]?key|auth[-_]?key|token|secret|password|passwd|credentials?|cookie)$",
    re.IGNORECASE,
)
_NOT_SECRET = re.compile(r"(^|[-_.])(eos|bos|pad|unk|sep|cls|mask|stop|image|end|start)[-_.]token$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"^Bearer\s+\S+$|\b(sk|hf|ghp|gho|xoxb|glpat)[-_][A-Za-z0-9_-]{16,}")
_URL_USER = re.compile(r"(?<=://)[^/@\s?#]+(?=@)")
_URL_QUERY = re.compile(r"([?&]([^=&#\s]+)=)([^&#\s]+)")


def mask_secrets(value: Any, name: str = "") -> Any:
    """A copy in which everything that looks like a secret is ``"***"``.

    Values of keys such as ``Authorization``, ``api_key``, ``token`` or ``password``; bearer tokens and keys of known
    form inside texts; and user information and such keys in URLs. Names of environment variables (``token_env``) and of
    a tokenizer's tokens (``eos_token``) are no secrets.

    Args:
        value: mappings, lists, texts or anything else, which is left alone.
        name: the key that it stands under.
    """
    if isinstance(value, Mapping):
        return {key: mask_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mask_secrets(item, name) for item in value)
    if not isinstance(value, str):
        return value
    if value and _is_secret(name):
        return MASK
    value = _URL_USER.sub(MASK, _SECRET_VALUE.sub(MASK, value))
    return _URL_QUERY.sub(
        lambda found: found[1] + (MASK if _is_secret(found[2]) or found[2] == "key" else found[3]), value
    )


def _is_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name)) and not _NOT_SECRET.search(name)
