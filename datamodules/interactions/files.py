"""Read user-item events from text files, in pieces, with whatever their ids look like."""

import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.reading import check_unpacked_size, reading

_LINES = 1_000_000  # read at a time
_MISSING = {"", "nan", "none", "null", "<na>", "nat"}  # what files and tables hold where an id is missing


class Events(NamedTuple):
    """Interactions in the order of their file.

    Attributes:
        users: places in ``user_ids``, int64 ``(events,)``.
        items: places in ``item_ids``, int64 ``(events,)``.
        values: ratings or counts, float32 ``(events,)``.
        user_ids: ascending: as numbers where all user ids are integers in their only spelling, else as text.
        item_ids: the same, whatever the user ids are.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    values: NDArray[np.float32]
    user_ids: NDArray
    item_ids: NDArray


class EventCollector:
    """Collects pieces of a file: keeps events with a high enough value and numbers the ids.

    Args:
        source: what to call the data in errors.
        min_value: events below are dropped; ``None``: none is.
    """

    def __init__(self, source: str, min_value: float | None) -> None:
        self.source = source
        self.min_value = min_value
        self.codes: tuple[dict, dict] = ({}, {})
        self.pieces: list[tuple[NDArray, NDArray, NDArray]] = []
        self.rows = 0

    def add(self, users: NDArray, items: NDArray, values: NDArray) -> None:
        """Add events: ids (integers or text) and values.

        Raises:
            ValueError: a value is not finite, or an id is missing or was not UTF-8.
        """
        if not (finite := np.isfinite(values)).all():
            row = int(np.argmin(finite))
            raise ValueError(f"{self.source}, row {self.rows + row + 1}: the rating must be finite, got {values[row]}")
        rows = np.arange(len(values))
        if self.min_value is not None:
            rows = np.flatnonzero(values >= self.min_value)
        coded = [
            self._encode(name, ids[rows], codes, rows)
            for name, ids, codes in zip(("user", "item"), (users, items), self.codes, strict=True)
        ]
        self.pieces.append((coded[0], coded[1], values[rows].astype(np.float32, copy=False)))
        self.rows += len(values)

    def _encode(self, name: str, ids: NDArray, codes: dict, rows: NDArray) -> NDArray[np.int64]:
        unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        keys = unique.tolist()
        if unique.dtype.kind not in "iu":
            for key, place in zip(keys, first.tolist(), strict=True):
                if key.strip().lower() in _MISSING or "\ufffd" in key:
                    problem = "is not UTF-8" if "\ufffd" in key else "is missing"
                    row = self.rows + int(rows[place]) + 1
                    raise ValueError(f"{self.source}, row {row}: the {name} id {problem}, got {key!r}")
        places = np.array([codes.setdefault(key, len(codes)) for key in keys], np.int64)
        return places[inverse]

    def events(self) -> Events:
        """Everything so far, with ids in ascending order."""
        columns = [np.concatenate(column) for column in zip(*self.pieces, strict=True)] if self.pieces else []
        users, items, values = columns or (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        (users, user_ids), (items, item_ids) = (
            _ascending(column, codes) for column, codes in zip((users, items), self.codes, strict=True)
        )
        return Events(users, items, values, user_ids, item_ids)


def _ascending(column: NDArray, codes: dict) -> tuple[NDArray, NDArray]:
    ids = np.array(list(codes))
    order = np.argsort(ids, kind="stable")
    places = np.empty(len(ids), np.int64)
    places[order] = np.arange(len(ids))
    return places[column], ids[order]


@contextmanager
def open_text(path: Path, member: str | None = None) -> Iterator[Iterable[str]]:
    """Lines of a file, or of a zip archive's member without unpacking it."""
    if member is None:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield file
    else:
        with zipfile.ZipFile(path) as archive, archive.open(member) as raw:
            info = archive.getinfo(member)
            check_unpacked_size(f"{path}:{member}", info.compress_size, info.file_size)
            yield io.TextIOWrapper(raw, encoding="utf-8", errors="replace")


def read_table(
    path: Path,
    columns: tuple[str | int, str | int, str | int | None],
    delimiter: str,
    min_value: float | None,
    member: str | None = None,
) -> Events:
    """Read a table of events.

    Args:
        path: the file, or a zip archive with ``member``.
        columns: user, item and value, by name when the first line names them (what follows a colon in a name, as in
            RecBole's files, is ignored), else by place, from 0; a value of ``None``: each event counts 1.
        delimiter: what separates columns.
        min_value: events below are dropped.
        member: see ``path``.

    Raises:
        ValueError: a column is missing, a line is not what the others are, or the file is damaged.
    """
    name = f"{path}:{member}" if member else str(path)
    with reading(name, "a table"):
        for user_type, item_type in product((np.int64, object), repeat=2):  # numbers, where they are
            try:
                return _read(path, columns, delimiter, min_value, member, (user_type, item_type), name)
            except _BadLineError as error:
                bad = error
        raise ValueError(str(bad)) from bad.__cause__


class _BadLineError(Exception):
    pass


def _read(
    path: Path,
    columns: tuple[str | int, str | int, str | int | None],
    delimiter: str,
    min_value: float | None,
    member: str | None,
    id_types: tuple[type, type],
    name: str,
) -> Events:
    collector = EventCollector(name, min_value)
    with open_text(path, member) as file:
        lines = iter(file)
        named = isinstance(columns[0], str)
        header = re.split(re.escape(delimiter), next(lines, "").strip("\ufeff\r\n")) if named else []
        places = _places(columns, [column.partition(":")[0].strip('"') for column in header], name)
        types = [("user", id_types[0]), ("item", id_types[1]), ("value", np.float32)][: len(places)]
        separator = delimiter
        if len(delimiter) > 1:
            separator = "\t"
            lines = (line.replace(delimiter, separator) for line in lines)
        start = int(named)
        while piece := list(islice(lines, _LINES)):
            try:
                rows = np.loadtxt(
                    piece, types, comments=None, delimiter=separator, usecols=places, quotechar='"', ndmin=1
                )
            except (ValueError, OverflowError) as error:
                raise _BadLineError(f"{name}, after line {start}: {error}") from error
            if np.int64 in id_types and _may_be_respelled(piece):
                texts = np.loadtxt(piece, object, comments=None, delimiter=separator, usecols=places[:2], ndmin=2)
                for field, kind, text in zip(("user", "item"), id_types, texts.T, strict=True):
                    if kind is np.int64 and (rows[field].astype(str) != np.char.strip(text.astype(str))).any():
                        raise _BadLineError(f"{name}: the {field} ids are not all integers in their only spelling")
            values = rows["value"] if "value" in (rows.dtype.names or ()) else np.ones(len(rows), np.float32)
            collector.add(_text(rows["user"]), _text(rows["item"]), values)
            start += len(piece)
    return collector.events()


def _may_be_respelled(lines: list[str]) -> bool:
    """Whether some number has more digits or signs than it takes, as "007": read as 7, it would be one with "7"."""
    text = "".join(["\n", *lines, "\n"])
    if "+" in text or "-0" in text:
        return True
    characters = np.frombuffer(text.encode(errors="replace"), np.uint8)
    digits = characters - ord("0") < 10  # unsigned: what is below wraps around
    begins = ~(digits | (characters == ord(".")))[:-2]
    return bool((begins & (characters[1:-1] == ord("0")) & digits[2:]).any())


def _text(ids: NDArray) -> NDArray:
    return ids.astype(str) if ids.dtype == object else ids


def read_columns(table: Any, columns: tuple[str | int, str | int, str | int | None], min_value: float | None) -> Events:
    """Take events from a table in memory, as :func:`read_table` does from a file.

    Raises:
        ValueError: a column is missing, is not as long as the others, or holds what is no id or no number.
    """
    try:
        users, items, *values = (np.asarray(table[name]) for name in columns if name is not None)
    except KeyError as error:
        raise ValueError(f"interactions has no column {error}.") from error
    try:
        values = [np.asarray(x, np.float32) for x in values] or [np.ones(len(users), np.float32)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"rating_column={columns[2]!r} must hold numbers: {error}") from error
    if not users.shape == items.shape == values[0].shape or users.ndim != 1:
        raise ValueError(f"The columns {columns} of interactions must be equally long, got {len(users)}, {len(items)}.")
    collector = EventCollector("interactions", min_value)
    collector.add(_integers_or_text(users), _integers_or_text(items), values[0])
    return collector.events()


def _integers_or_text(ids: NDArray) -> NDArray:
    """Ids of any dtype: integers where all are, also as floats or objects (a table with a gap has these)."""
    if ids.dtype.kind == "f" and (ids == np.rint(ids)).all() and (np.abs(ids) < 2**53).all():
        return ids.astype(np.int64)
    if ids.dtype.kind == "O" and all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in ids):
        return ids.astype(np.int64)
    return ids if ids.dtype.kind in "iu" else ids.astype(str)


def _places(columns: tuple[str | int | None, ...], header: list[str], name: str) -> list[int]:
    """Where the columns are."""
    wanted = [column for column in columns if column is not None]
    if missing := [column for column in wanted if isinstance(column, str) and column not in header]:
        raise ValueError(
            f"{name} has no column {', '.join(map(repr, missing))}; its first line names {header}. "
            "For a file without names, give the columns' places, from 0."
        )
    return [column if isinstance(column, int) else header.index(column) for column in wanted]


def read_netflix(files: list[Path], min_value: float | None) -> Events:
    """Read Netflix's ``mv_*.txt`` or ``combined_data_*.txt``: a line ``movie:``, then lines ``user,rating,date``.

    Raises:
        ValueError: a file does not begin with a movie, or a line is not what it should be.
    """
    collector = EventCollector("", min_value)
    for file in files:
        collector.source, collector.rows = str(file), 0
        content = file.read_bytes()
        movies = list(re.finditer(rb"^(\d+):[ \t]*\r?\n", content, re.MULTILINE))
        if not movies or movies[0].start() != 0:
            raise ValueError(f"{file} does not begin with a line 'movie:' as Netflix's files do.")
        for movie, following in zip(movies, [*movies[1:], None], strict=True):
            block = content[movie.end() : following.start() if following else len(content)]
            if not block.strip():
                continue
            try:
                rows = np.loadtxt(io.BytesIO(block), np.int64, delimiter=",", usecols=(0, 1), ndmin=2)
            except (ValueError, OverflowError) as error:
                raise ValueError(f"{file}, movie {movie[1].decode()}: {error}") from error
            collector.add(rows[:, 0], np.full(len(rows), int(movie[1])), rows[:, 1].astype(np.float32))
    return collector.events()
