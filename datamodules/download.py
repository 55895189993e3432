"""Checksummed, resumable downloads for ``prepare_data``."""

import hashlib
import os
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

_CHUNK = 1 << 20


def fetch(
    urls: Sequence[str], path: Path, md5: str | None = None, *, sha256: str | None = None, timeout: float = 20.0
) -> Path:
    """Download one file unless it is there already, and return its path.

    Bytes go to ``<path>.part``. A later call carries on where an interrupted one stopped (HTTP ``Range``), the finished
    file is checked against its checksum, and only then does it take its name, by an atomic rename: ``path`` is never a
    half-written file. A part whose checksum is wrong is deleted. One process at a time may fetch a file.

    Args:
        urls: mirrors of the file, tried in order.
        path: where the file shall be; its folder is made.
        md5: the published MD5, as hexadecimal digits (it guards against damage, not against an attacker).
        sha256: the published SHA-256, likewise. Without either only the length is checked.
        timeout: seconds without a byte after which a mirror counts as unreachable.

    Raises:
        OSError: when no mirror delivers the file; the message holds every mirror's failure.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    kind, expected = ("SHA-256", sha256) if sha256 else ("MD5", md5)
    failures = []
    for url in urls:
        try:
            resumed = part.exists()
            _append(url, part, timeout)
            if expected and resumed and _digest(part, kind) != expected:  # the part was of another version: start over
                part.unlink()
                _append(url, part, timeout)
            if expected and (found := _digest(part, kind)) != expected:
                part.unlink()
                raise OSError(f"{kind} is {found}, not {expected}")
        except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
            failures.append(f"{url}: {error or type(error).__name__}")
        else:
            os.replace(part, path)
            return path
    raise OSError(f"Could not download {path.name}. " + "; ".join(failures))


def _append(url: str, part: Path, timeout: float) -> None:
    """Fetch the bytes of ``url`` that ``part`` still lacks."""
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"User-Agent": "lit-methods", **({"Range": f"bytes={have}-"} if have else {})})
    try:
        response = urlopen(request, timeout=timeout)
    except HTTPError as error:
        if have and error.code == 416:  # nothing is missing; the checksum decides
            return
        raise
    with response:
        if response.status != 206:  # the server sends the whole file
            have = 0
        with part.open("ab" if have else "wb") as file:
            expected = response.headers.get("Content-Length")
            received = 0
            while chunk := response.read(_CHUNK):
                received += file.write(chunk)
    if expected is not None and received != int(expected):
        raise OSError(f"connection closed after {received} of {expected} bytes (kept; the next call carries on)")


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        if kind == "SHA-256":
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
