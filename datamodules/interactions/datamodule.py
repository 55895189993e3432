"""User-item interactions with the strong-generalisation split of Liang et al. (WWW 2018, arXiv 1802.05814)."""

import hashlib
import json
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.batches import InteractionBatch
from lit_methods.datamodules.interactions.files import Events, read_columns, read_table
from lit_methods.datamodules.reading import reading
from lit_methods.datamodules.tensors import TensorDataModule, TensorRows, UnrepeatedSampler, check_int


class Table(Protocol):
    """Columns by name: a pandas ``DataFrame``, or a dictionary of arrays."""

    def __getitem__(self, column: str, /) -> Any:
        """The column, ``(events,)``."""


class _UserRows(NamedTuple):
    """Which rows of the histories a stage has: what is sampled, and made into batches by :func:`_fetch`."""

    rows: Tensor


class Split(NamedTuple):
    """Users in rows: first the training users, then those for validation, then those for the test.

    Attributes:
        items: histories, int32 ``(nnz,)``; for held-out users the fold-in part.
        offsets: int64 ``(users + 1,)``.
        values: float32 ``(nnz,)``, or empty when every interaction counts 1.
        target_items: held-out parts, int32.
        target_offsets: int64 ``(users + 1,)``.
        sizes: number of training, validation and test users, int64 ``(3,)``.
        user_ids: of the rows.
        item_ids: of the items: the vocabulary, in the order in which training users first name them in the file.
    """

    items: NDArray[np.int32]
    offsets: NDArray[np.int64]
    values: NDArray[np.float32]
    target_items: NDArray[np.int32]
    target_offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    user_ids: NDArray
    item_ids: NDArray


class InteractionsDataModule(TensorDataModule):
    """Interactions of users with items, from a table or a sparse matrix; whole users are held out.

    Batches are :class:`~lit_methods.batches.InteractionBatch`. The protocol is the authors', to the bit where the file
    is theirs: keep events with ``min_rating``; of repeated pairs the first; drop items, then users, with too few
    events (once); permute users in ascending order of their ids by NumPy's legacy generator; the last
    ``num_heldout_users`` are for the test, those before for validation. Items that no training user has are dropped.
    Of a held-out user's n >= 5 items, ``int(target_fraction * n)`` drawn ones are the targets and the others the
    history; with fewer, all are history (metrics skip and count such users). If that is so for all of them, ``setup``
    refuses the split.

    Ids are numbers where all of a column are integers in their only spelling; with "007" among them, all are text.

    Evaluation visits each user once on any number of ranks. After ``setup``, ``num_items`` and ``item_ids`` (the id of
    each item index) are known; :class:`~lit_methods.vi.MultVAE` asks for ``num_items`` by itself.

    Args:
        interactions: path of a text table whose first line names the columns, or of a scipy sparse matrix in ``.npz``
            (users in rows); or such a matrix itself, or a table in memory (``DataFrame`` or dictionary of arrays).
        user_column: name of the column with user ids (integers or text), or its place, from 0, in a file whose first
            line is an event; names or places for all three columns.
        item_column: name or place of the column with item ids.
        rating_column: name or place of the column with ratings or counts; None: every event counts 1, and
            ``min_rating`` has nothing to apply to.
        delimiter: what separates columns.
        min_rating: smallest rating that counts as an interaction; None: any. The authors: 4 of 5 stars.
        min_user_interactions: users with fewer are dropped, >= 1.
        min_item_interactions: items with fewer are dropped, >= 0.
        num_heldout_users: users for validation, and again as many for the test, >= 1.
        target_fraction: share of a held-out user's items to be recommended, in (0, 1).
        binarize: every interaction counts 1; False: values are counts (the sum over repeated pairs).
        split_seed: seed of the split, >= 0.
        cache_dir: folder for the processed data (rank zero writes it in ``prepare_data``), which is read instead of
            the file while settings and file stay the same; None: none.
        batch_size: users per training batch on each rank, >= 1.
        eval_batch_size: users per evaluation batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the order of training users, >= 0.

    Raises:
        ValueError: an argument out of range; in ``setup``: missing columns, missing ids, ratings that are no finite
            numbers (with file and row), too few users to hold out so many, or none of them with a target.
        FileNotFoundError: the file is not there.
    """

    def __init__(
        self,
        interactions: str | Path | sparse.csr_array | sparse.csr_matrix | Table,
        user_column: int | str = "user_id",
        item_column: int | str = "item_id",
        rating_column: int | str | None = "rating",
        delimiter: str = ",",
        min_rating: float | None = 4.0,
        min_user_interactions: int = 5,
        min_item_interactions: int = 0,
        num_heldout_users: int = 10_000,
        target_fraction: float = 0.2,
        binarize: bool = True,
        split_seed: int = 98765,
        cache_dir: str | None = None,
        batch_size: int = 500,
        eval_batch_size: int = 2000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.interactions = interactions
        self.columns = (user_column, item_column, rating_column)
        if len({type(column) for column in self.columns if column is not None}) > 1:
            raise ValueError(
                f"user_column, item_column and rating_column must all be names, or all places, got {self.columns}"
            )
        self.delimiter = delimiter
        self.min_rating = min_rating if rating_column is not None else None
        self.min_user_interactions = check_int("min_user_interactions", min_user_interactions, 1)
        self.min_item_interactions = check_int("min_item_interactions", min_item_interactions, 0)
        self.num_heldout_users = check_int("num_heldout_users", num_heldout_users, 1)
        if not 0 < target_fraction < 1:
            raise ValueError(f"Invalid target_fraction={target_fraction!r}: must be in (0, 1).")
        self.target_fraction = target_fraction
        self.binarize = binarize
        self.split_seed = check_int("split_seed", split_seed, 0, 2**32 - 1)
        self.cache_dir = cache_dir
        self.eval_batch_size = check_int("eval_batch_size", eval_batch_size, 1)
        self.num_items: int | None = None
        self.item_ids: NDArray | None = None
        self.user_ids: NDArray | None = None

    def prepare_data(self) -> None:
        """Write the processed data, if a ``cache_dir`` is given and it is not there yet."""
        if self.cache_dir is not None and _load_cache(cache := self._cache()) is None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_name(cache.name + ".part")
            with part.open("wb") as file:
                np.savez(file, **self._split()._asdict())
            os.replace(part, cache)

    def setup(self, stage: str) -> None:
        """Read and split, once."""
        if self.num_items is not None:
            return
        split = _load_cache(self._cache()) if self.cache_dir is not None else None
        split = split or self._split()
        self.num_items, self.item_ids, self.user_ids = len(split.item_ids), split.item_ids, split.user_ids
        self.histories = InteractionBatch(
            torch.from_numpy(split.items),
            torch.from_numpy(split.offsets),
            torch.from_numpy(split.values) if len(split.values) else None,
            torch.from_numpy(split.target_items),
            torch.from_numpy(split.target_offsets),
        )
        self.transform = partial(_fetch, self.histories)
        rows = torch.arange(len(split.offsets) - 1).split(split.sizes.tolist())
        self.train_data, self.val_data, self.test_data = map(_UserRows, rows)

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run must share with the run that wrote the checkpoint."""
        return {**super().state_dict(), "split_seed": self.split_seed, "num_items": self.num_items or 0}

    def _eval_loader(self, data: tuple[Tensor, ...] | None) -> StatefulDataLoader | list[StatefulDataLoader]:
        if data is None:
            return []
        rows = TensorRows(data, self.transform)
        return self._loader(rows, UnrepeatedSampler(rows, *self._ranks()), self.eval_batch_size)

    def _split(self) -> Split:
        return split_events(
            self._read(),
            self.min_user_interactions,
            self.min_item_interactions,
            self.num_heldout_users,
            self.target_fraction,
            self.binarize,
            self.split_seed,
        )

    def _cache(self) -> Path:
        """Where the processed data is or will be; its name depends on everything that it depends on."""
        assert self.cache_dir is not None
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self._sources()]
        settings = (
            files, self.columns, self.delimiter, self.min_rating, self.min_user_interactions,
            self.min_item_interactions, self.num_heldout_users, self.target_fraction, self.binarize, self.split_seed,
        )  # fmt: skip
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        return Path(self.cache_dir) / f"{type(self).__name__}-{key}.npz"

    def _sources(self) -> list[Path]:
        """The files that are read; raises when one is not there."""
        if not isinstance(self.interactions, str | Path):
            raise ValueError(f"Invalid cache_dir={self.cache_dir!r}: must be None for interactions in memory.")
        path = Path(self.interactions)
        if not path.is_file():
            columns = ", ".join(str(column) for column in self.columns if column is not None)
            raise FileNotFoundError(
                f"{type(self).__name__} lacks {path.absolute()}: pass interactions=<path of your table with columns "
                f"{columns}, or of a scipy sparse matrix in .npz>."
            )
        return [path]

    def _read(self) -> Events:
        """All events with a high enough rating, in the order of the file."""
        source = self.interactions
        if isinstance(source, str | Path):
            [path] = self._sources()
            if path.suffix != ".npz":
                return read_table(path, self.columns, self.delimiter, self.min_rating)
            with reading(path, "a scipy sparse matrix"):
                source = sparse.load_npz(path)
        if not sparse.issparse(source):
            return read_columns(source, self.columns, self.min_rating)
        entries = sparse.csr_array(source).tocoo()
        if not np.isfinite(entries.data).all():
            place = int(np.argmin(np.isfinite(entries.data)))
            user, item = (int(column[place]) for column in entries.coords)
            raise ValueError(f"interactions must be finite, got {entries.data[place]} in row {user}, column {item}")
        keep = entries.data >= (self.min_rating if self.min_rating is not None else -np.inf)
        users, items = (column[keep].astype(np.int64) for column in entries.coords)
        sizes = entries.shape
        return Events(users, items, entries.data[keep].astype(np.float32), *(np.arange(size) for size in sizes))


def _load_cache(path: Path) -> Split | None:
    """What was written there; None if nothing was, or it is damaged."""
    if not path.exists():
        return None
    try:
        with reading(path, "a cache of this class"), np.load(path, allow_pickle=False) as arrays:
            return Split(**arrays)
    except ValueError as error:
        warnings.warn(f"{error} It is made anew.", stacklevel=2)
        return None


def split_events(
    events: Events,
    min_user_interactions: int,
    min_item_interactions: int,
    num_heldout_users: int,
    target_fraction: float,
    binarize: bool,
    seed: int,
) -> Split:
    """Filter and split as :class:`InteractionsDataModule` says.

    Raises:
        ValueError: fewer than ``2 * num_heldout_users + 1`` users are left, or values below 0 as counts.
    """
    users, items, values, user_ids, item_ids = events
    _, first, inverse = np.unique(users * len(item_ids) + items, return_index=True, return_inverse=True)
    if not binarize:
        if len(values) and values.min() < 0:
            raise ValueError(f"binarize=False: values are counts and must be >= 0, got {values.min()}.")
        sums = np.bincount(inverse, values)
    in_order = np.argsort(first)
    users, items, values = users[first[in_order]], items[first[in_order]], values[first[in_order]]
    if not binarize:
        values = sums[in_order].astype(np.float32)
    keep = np.bincount(items, minlength=len(item_ids))[items] >= min_item_interactions
    users, items, values = users[keep], items[keep], values[keep]
    keep = np.bincount(users, minlength=len(user_ids))[users] >= min_user_interactions
    users, items, values = users[keep], items[keep], values[keep]

    kept_users = np.unique(users)
    if len(kept_users) == 0:
        raise ValueError(
            f"No user is left: of {len(events.users)} interactions with at least min_rating, none passes "
            f"min_item_interactions={min_item_interactions} and min_user_interactions={min_user_interactions}."
        )
    if 2 * num_heldout_users >= len(kept_users):
        raise ValueError(
            f"Invalid num_heldout_users={num_heldout_users!r}: must be < {len(kept_users) / 2:g}: the filters leave "
            f"{len(kept_users)} users, and so many are held out for validation and again for the test."
        )
    shuffled = kept_users[np.random.RandomState(seed).permutation(len(kept_users))]
    parts = np.split(shuffled, [-2 * num_heldout_users, -num_heldout_users])
    part_of_user = np.full(len(user_ids), -1)
    for part, members in enumerate(parts):
        part_of_user[members] = part
    parts_of_events = part_of_user[users]

    vocabulary, first = np.unique(items[parts_of_events == 0], return_index=True)
    vocabulary = vocabulary[np.argsort(first)]
    new_items = np.full(len(item_ids), -1, np.int32)
    new_items[vocabulary] = np.arange(len(vocabulary), dtype=np.int32)
    known = new_items[items] >= 0
    users, items, values, parts_of_events = users[known], new_items[items[known]], values[known], parts_of_events[known]

    order = np.lexsort((users, parts_of_events))  # stable: the order of the file within a user
    users, items, values = users[order], items[order], values[order]
    row_users = np.concatenate([np.sort(part) for part in parts])
    row_of_user = np.full(len(user_ids), -1)
    row_of_user[row_users] = np.arange(len(row_users))
    counts = np.bincount(row_of_user[users], minlength=len(row_users))
    is_target = np.zeros(len(users), bool)
    starts = np.cumsum(counts) - counts
    sizes = np.array([len(part) for part in parts])
    for part in (1, 2):
        generator = np.random.RandomState(seed)
        low = sizes[:part].sum()
        for n, start in zip(counts[low : low + sizes[part]], starts[low : low + sizes[part]], strict=True):
            if n >= 5:
                is_target[start + generator.choice(n, size=int(target_fraction * n), replace=False)] = True
    target_counts = np.bincount(row_of_user[users[is_target]], minlength=len(row_users))
    for part, stage in ((1, "validation"), (2, "test")):
        low = sizes[:part].sum()
        if not target_counts[low : low + sizes[part]].any():
            raise ValueError(
                f"None of the {sizes[part]} {stage} users has a target: it takes 5 items that training users have, and "
                f"target_fraction={target_fraction} of them must be at least 1. Raise min_user_interactions, "
                "num_heldout_users or target_fraction."
            )
    return Split(
        items[~is_target],
        _offsets(counts - target_counts),
        np.empty(0, np.float32) if binarize else values[~is_target],
        items[is_target],
        _offsets(target_counts),
        sizes,
        user_ids[row_users],
        item_ids[vocabulary],
    )


def _offsets(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)])


def _fetch(histories: InteractionBatch, users: _UserRows) -> InteractionBatch:
    """The batch of the given rows, by one gather for each tensor."""
    entries, offsets = _entries(histories.offsets, users.rows)
    target_entries, target_offsets = _entries(histories.target_offsets, users.rows)
    return InteractionBatch(
        histories.items[entries].long(),
        offsets,
        None if histories.values is None else histories.values[entries],
        histories.target_items[target_entries].long(),
        target_offsets,
    )


def _entries(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the rows' entries, and the offsets of these rows side by side."""
    starts = offsets[rows]
    counts = offsets[rows + 1] - starts
    ends = counts.cumsum(0)
    shifts = (starts - ends + counts).repeat_interleave(counts)
    return torch.arange(len(shifts)) + shifts, torch.cat([ends.new_zeros(1), ends])
