"""Synthetic interactions in the files of the public data sets, small."""

from pathlib import Path

import numpy as np


def synthetic(users: int = 60, items: int = 30, seed: int = 0) -> list[tuple[int, int, int]]:
    """(user, item, rating) with two kinds of users and ratings 1 to 5, in random order."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        liked = np.arange(items) % 2 == user % 2
        for item in rng.permutation(items)[:20]:
            rows.append((user + 1, int(item) + 1, int(rng.integers(4, 6) if liked[item] else rng.integers(1, 5))))
    return [rows[i] for i in rng.permutation(len(rows))]


def write_u_data(folder: Path, **sizes: int) -> None:
    """``u.data`` of MovieLens-100K."""
    lines = [f"{user}\t{item}\t{rating}\t881250949" for user, item, rating in synthetic(**sizes)]
    (folder / "u.data").write_text("\n".join(lines) + "\n")


def write_netflix(folder: Path) -> None:
    """``combined_data_1.txt``: rows by movie."""
    rows, text = synthetic(), ""
    for movie in sorted({item for _, item, _ in rows}):
        text += f"{movie}:\n" + "".join(f"{u},{r},2005-09-06\n" for u, i, r in rows if i == movie)
    (folder / "combined_data_1.txt").write_text(text)


def write_msd(folder: Path) -> None:
    """``train_triplets.txt``: ids are text."""
    lines = [f"user{user:03d}\tSO{item:02d}\t{rating}" for user, item, rating in synthetic()]
    (folder / "train_triplets.txt").write_text("\n".join(lines) + "\n")
