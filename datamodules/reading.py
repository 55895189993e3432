"""What all readers of files share: errors that name the file, and a limit on what may be unpacked.

Nothing here or in a reader unpickles: a pickle runs whatever its writer wants.
"""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_ALWAYS = 2**30  # bytes that may be unpacked from any file
_RATIO = 200  # and beyond these, this many for a byte in the file; text and images need 3 to 50

_DAMAGE = (
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    struct.error,
    UnicodeError,
    MemoryError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,  # encrypted archives, and h5py
)


@contextmanager
def reading(path: Path | str, kind: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a damaged file into one error that names the file.

    Args:
        path: the file.
        kind: what it should be, such as "a zip archive".

    Raises:
        ValueError: in place of the library's error. A missing or forbidden file keeps its own error, which names it.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
        raise
    except _DAMAGE as error:
        if str(path) in str(error):
            raise
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or not {kind} ({reason}). Fetch or write it again.") from error


def check_unpacked_size(path: Path | str, packed: int, unpacked: int) -> None:
    """Refuse a file that claims to unpack to far more than real data does.

    Args:
        path: the file, or its member.
        packed: bytes that it has.
        unpacked: bytes that it would have.

    Raises:
        ValueError: more than 1 GiB, and more than 200 times the bytes it has.
    """
    if unpacked > max(_ALWAYS, _RATIO * packed):
        raise ValueError(
            f"{path} would unpack from {packed} to {unpacked} bytes; unpacked data must be <= 1 GiB, or <= {_RATIO} "
            "times the packed"
        )


def open_unpacked(path: Path) -> BinaryIO:
    """Open a file for reading in binary; ``.gz`` and ``.bz2`` are unpacked, up to the limit on their size."""
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
    if path.suffix not in openers:
        return path.open("rb")
    return io.BufferedReader(_Limited(openers[path.suffix](path), path))


class _Limited(io.RawIOBase):
    """Bytes that are unpacked while they are read, until they are too many."""

    def __init__(self, unpacked: BinaryIO, path: Path) -> None:
        self.unpacked = unpacked
        self.path = path
        self.packed_size = path.stat().st_size
        self.read_size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self.unpacked.read(len(buffer))
        self.read_size += len(chunk)
        check_unpacked_size(self.path, self.packed_size, self.read_size)
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self.unpacked.close()
        super().close()
