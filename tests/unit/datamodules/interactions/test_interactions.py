import importlib.metadata
import io
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from lit_methods.batches import InteractionBatch
from lit_methods.datamodules import (
    InteractionsDataModule,
    MovieLensDataModule,
    MSDTasteProfileDataModule,
    NetflixPrizeDataModule,
)
from tests.standins.interaction_files import synthetic, write_msd, write_netflix, write_u_data

SMALL: dict[str, Any] = {"num_heldout_users": 8, "min_user_interactions": 10}


def ready(data: InteractionsDataModule) -> InteractionsDataModule:
    data.prepare_data()
    data.setup("fit")
    return data


def rows_of(data: InteractionsDataModule) -> dict[str, list[tuple[Any, list[Any], list[Any]]]]:
    """Stage -> (user id, history, targets) with original ids, in order."""
    h, result = data.histories, {}
    for stage in ("train", "val", "test"):
        result[stage] = [
            (
                data.user_ids[row],
                data.item_ids[h.items[h.offsets[row] : h.offsets[row + 1]].numpy()].tolist(),
                data.item_ids[h.target_items[h.target_offsets[row] : h.target_offsets[row + 1]].numpy()].tolist(),
            )
            for row in getattr(data, f"{stage}_data").rows.tolist()
        ]
    return result


def authors_split(events: list[tuple[Any, Any, int]], heldout: int, least: int) -> dict[str, list[Any]]:
    """The protocol written out user by user, with the legacy generator's global functions."""
    by_user: dict[Any, list[Any]] = defaultdict(list)
    for user, item, rating in events:
        if rating > 3.5:
            by_user[user].append(item)
    users = np.array(sorted(user for user, items in by_user.items() if len(items) >= least))
    np.random.seed(98765)  # noqa: NPY002
    users = users[np.random.permutation(len(users))]  # noqa: NPY002
    train, val, test = users[: -2 * heldout], users[-2 * heldout : -heldout], users[-heldout:]
    vocabulary = list(dict.fromkeys(i for u, i, r in events if r > 3.5 and u in set(train.tolist())))
    result: dict[str, list[Any]] = {"train": [(u, by_user[u], []) for u in sorted(train.tolist())], "items": vocabulary}
    for stage, members in (("val", val), ("test", test)):
        np.random.seed(98765)  # noqa: NPY002
        result[stage] = []
        for user in sorted(members.tolist()):
            items = [i for i in by_user[user] if i in vocabulary]
            drawn = np.zeros(len(items), bool)
            if len(items) >= 5:
                drawn[np.random.choice(len(items), size=int(0.2 * len(items)), replace=False)] = True  # noqa: NPY002
            result[stage].append(
                (user, [i for i, d in zip(items, drawn, strict=True) if not d], [items[j] for j in np.where(drawn)[0]])
            )
    return result


def test_split_is_the_authors(tmp_path) -> None:
    write_u_data(tmp_path, users=80, items=40)
    data = ready(MovieLensDataModule("100k", str(tmp_path), **SMALL))
    expected = authors_split(synthetic(users=80, items=40), heldout=8, least=10)
    assert data.item_ids.tolist() == expected.pop("items")
    assert rows_of(data) == expected
    assert data.num_items == len(data.item_ids)


def test_batches_are_sparse_rows(tmp_path) -> None:
    write_u_data(tmp_path)
    data = ready(MovieLensDataModule("100k", str(tmp_path), batch_size=7, eval_batch_size=5, **SMALL))
    expected = rows_of(data)
    loader = data.train_dataloader()
    order = list(loader.sampler)
    loader.sampler.set_epoch(0)
    batches = list(loader)
    assert [b.num_users for b in batches][:-1] == [7] * (len(order) // 7)
    seen = [
        data.item_ids[b.items[b.offsets[u] : b.offsets[u + 1]]].tolist() for b in batches for u in range(b.num_users)
    ]
    assert seen == [expected["train"][row][1] for row in order]
    assert all(len(b.target_items) == 0 and b.values is None for b in batches)
    for stage, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = list(loader)
        assert [b.num_users for b in batches] == [5, 3]
        for field, place in (("", 1), ("target_", 2)):
            seen = []
            for b in batches:
                items, offsets = getattr(b, f"{field}items"), getattr(b, f"{field}offsets")
                seen += [data.item_ids[items[offsets[u] : offsets[u + 1]]].tolist() for u in range(b.num_users)]
            assert seen == [row[place] for row in expected[stage]]
    assert batches[0].items.dtype == torch.int64
    assert batches[0].rows().tolist() == sorted(batches[0].rows().tolist())
    assert isinstance(batches[0], InteractionBatch)


def ratings_csv(events: list[tuple[Any, Any, int]], header: str = "userId,movieId,rating,timestamp") -> str:
    return "\n".join([header, *(f"{u},{i},{r}.0,0" for u, i, r in events)]) + "\n"


def test_all_files_of_movielens_hold_the_same(tmp_path) -> None:
    events = synthetic()
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    contents = {
        "u.data": ("100k", "\n".join(f"{u}\t{i}\t{r}\t0" for u, i, r in events)),
        "ratings.dat": ("1m", "\n".join(f"{u}::{i}::{r}::0" for u, i, r in events)),
        "ratings.csv": ("20m", ratings_csv(events)),
        "ml-100k.inter": ("100k", inter + "\n".join(f"{u}\t{i}\t{r}\t0" for u, i, r in events)),
    }
    results = []
    for place, (name, (version, text)) in enumerate(contents.items()):
        flat, nested, zipped = (tmp_path / f"{kind}{place}" for kind in ("flat", "nested", "zipped"))
        for folder in (flat, nested / f"ml-{version}", zipped):
            folder.mkdir(parents=True)
        (flat / name).write_text(text)
        (nested / f"ml-{version}" / name).write_text(text)
        with zipfile.ZipFile(zipped / f"ml-{version}.zip", "w") as archive:
            archive.writestr(f"ml-{version}/README.txt", "nothing")
            archive.writestr(f"ml-{version}/{name}", text)
        for folder in (flat, nested, zipped, flat / name, zipped / f"ml-{version}.zip"):
            results.append(rows_of(ready(MovieLensDataModule(version, str(folder), download=False, **SMALL))))
    assert all(result == results[0] for result in results)


def test_the_file_in_an_installed_recbole_is_found(tmp_path, monkeypatch) -> None:
    package = tmp_path / "site" / "recbole" / "dataset_example" / "ml-100k"
    package.mkdir(parents=True)
    write_u_data(tmp_path)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (package / "ml-100k.inter").write_text(header + (tmp_path / "u.data").read_text())
    info = tmp_path / "site" / "recbole-1.2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
    (info / "RECORD").write_text("recbole/dataset_example/ml-100k/ml-100k.inter,,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = ready(MovieLensDataModule("100k", str(tmp_path / "nothing"), download=False, **SMALL))
    assert rows_of(found) == rows_of(ready(MovieLensDataModule("100k", str(tmp_path), **SMALL)))
    assert "recbole" not in sys.modules


def test_missing_movielens_says_what_to_do(tmp_path, monkeypatch) -> None:
    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    monkeypatch.setattr(MovieLensDataModule, "mirrors", ("http://127.0.0.1:9/",))  # nobody listens there
    message = r"(?s)lacks the ratings of MovieLens 100k in .*ml-100k\.zip there.*pip install --no-deps recbole"
    with pytest.raises(FileNotFoundError, match=f"{message}.*The download failed: Could not download"):
        MovieLensDataModule("100k", str(tmp_path)).prepare_data()
    with pytest.raises(FileNotFoundError, match=message):
        MovieLensDataModule("100k", str(tmp_path), download=False).setup("fit")


def test_damaged_or_foreign_archives_are_named(tmp_path) -> None:
    archive = tmp_path / "ml-20m.zip"
    archive.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"ml-20m\.zip is damaged or not a zip archive"):
        MovieLensDataModule("20m", str(tmp_path)).setup("fit")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("other.txt", "")
    with pytest.raises(ValueError, match=r"holds no ratings\.csv, .* only \['other\.txt'\]"):
        MovieLensDataModule("20m", str(tmp_path)).setup("fit")


def test_netflix(tmp_path) -> None:
    write_netflix(tmp_path)
    data = ready(NetflixPrizeDataModule(str(tmp_path), **SMALL))
    by_movie = sorted(synthetic(), key=lambda event: event[1])  # stable: the order of users within a movie
    expected = authors_split(by_movie, heldout=8, least=10)
    assert data.item_ids.tolist() == expected.pop("items")
    assert rows_of(data) == expected
    text = (tmp_path / "combined_data_1.txt").read_text()
    (tmp_path / "combined_data_1.txt").unlink()
    (tmp_path / "training_set").mkdir()
    for block in text.strip().split(":\n")[1:]:
        movie = text[: text.index(block)].strip().rsplit("\n", 1)[-1].rstrip(":")
        lines = [line for line in block.split("\n") if "," in line]
        name = f"mv_{int(movie):07d}.txt"
        (tmp_path / "training_set" / name).write_text("\n".join([f"{movie}:", *lines]) + "\n")
    assert rows_of(ready(NetflixPrizeDataModule(str(tmp_path), **SMALL))) == expected
    with pytest.raises(FileNotFoundError, match=r"neither combined_data_\*\.txt nor mv_\*\.txt in"):
        NetflixPrizeDataModule(str(tmp_path / "nothing")).setup("fit")
    (tmp_path / "combined_data_1.txt").write_text("1488844,3,2005-09-06\n")
    with pytest.raises(ValueError, match="does not begin with a line 'movie:'"):
        NetflixPrizeDataModule(str(tmp_path)).setup("fit")


def test_msd_filters_songs_then_users_and_counts_plays(tmp_path) -> None:
    write_msd(tmp_path)
    options: dict[str, Any] = {"num_heldout_users": 8, "min_user_interactions": 15, "min_item_interactions": 38}
    data = ready(MSDTasteProfileDataModule(str(tmp_path), **options))
    events = [(f"user{u:03d}", f"SO{i:02d}") for u, i, _ in synthetic()]
    listeners: dict[str, int] = defaultdict(int)
    for _, song in events:
        listeners[song] += 1
    kept = [event for event in events if listeners[event[1]] >= 38]
    songs: dict[str, int] = defaultdict(int)
    for user, _ in kept:
        songs[user] += 1
    users = sorted(user for user, count in songs.items() if count >= 15)
    assert 0 < len(users) < 60
    assert sorted(data.user_ids.tolist()) == users
    assert set(data.item_ids.tolist()) <= {song for song, count in listeners.items() if count >= 38}
    rows = [row for stage in rows_of(data).values() for row in stage]
    assert sum(len(history) + len(targets) for _, history, targets in rows) == sum(u in set(users) for u, _ in kept)
    counted = ready(MSDTasteProfileDataModule(str(tmp_path), binarize=False, **options))
    plays = {(f"user{u:03d}", f"SO{i:02d}"): r for u, i, r in synthetic()}
    h = counted.histories
    for row, item, value in zip(h.rows().tolist(), h.items.tolist(), h.values.tolist(), strict=True):
        assert value == plays[counted.user_ids[row], counted.item_ids[item]]
    with zipfile.ZipFile(tmp_path / "train_triplets.txt.zip", "w") as archive:
        archive.write(tmp_path / "train_triplets.txt", "train_triplets.txt")
    (tmp_path / "train_triplets.txt").unlink()
    assert rows_of(ready(MSDTasteProfileDataModule(str(tmp_path), **options))) == rows_of(data)
    with pytest.raises(FileNotFoundError, match=r"lacks train_triplets\.txt in"):
        MSDTasteProfileDataModule(str(tmp_path / "nothing")).setup("fit")


def test_tables_of_ones_own(tmp_path) -> None:
    events = synthetic()
    path = tmp_path / "mine.txt"
    path.write_text("when;who;what;stars\n" + "\n".join(f'0;"u {u}";i{i};{r}' for u, i, r in events))
    columns: dict[str, Any] = {"user_column": "who", "item_column": "what", "rating_column": "stars", "delimiter": ";"}
    data = ready(InteractionsDataModule(str(path), **columns, **SMALL))
    assert set(data.user_ids.tolist()) <= {f"u {u}" for u, _, _ in events}
    numbers = sorted(int(str(user)[2:]) for user in data.user_ids)
    ours = [len(history) + len(targets) for rows in rows_of(data).values() for _, history, targets in rows]
    liked = defaultdict(int)
    for u, _, r in events:
        liked[u] += r >= 4
    assert numbers == sorted(u for u, n in liked.items() if n >= 10)
    assert sum(ours) == sum(liked[u] for u in numbers)
    everything = ready(
        InteractionsDataModule(str(path), **{**columns, "rating_column": None}, min_rating=None, **SMALL)
    )
    assert len(everything.user_ids) == 60


@pytest.mark.parametrize(("user", "item"), [("{}", "m{}"), ("u{}", "{}"), ("{}", "{}")])
def test_user_ids_that_are_numbers_are_ordered_as_numbers_whatever_items_are(user, item, tmp_path) -> None:
    """The split permutes users in ascending order: 2 before 10, but "u10" before "u2"."""
    events = synthetic(users=80, items=40)
    path = tmp_path / "t.csv"
    named = [(user.format(u), item.format(i), r) for u, i, r in events]
    path.write_text(ratings_csv(named, "user_id,item_id,rating,timestamp"))
    data = ready(InteractionsDataModule(str(path), **SMALL))
    typed: list[Any] = [(int(u) if u.isdigit() else u, int(i) if i.isdigit() else i, r) for u, i, r in named]
    expected = authors_split(typed, heldout=8, least=10)
    assert data.item_ids.tolist() == expected.pop("items")
    assert rows_of(data) == expected


def test_tables_in_memory(tmp_path) -> None:
    users, items, ratings = (list(column) for column in zip(*synthetic(), strict=True))
    path = tmp_path / "t.csv"
    path.write_text(ratings_csv(synthetic(), "user_id,item_id,rating,timestamp"))
    expected = rows_of(ready(InteractionsDataModule(path, **SMALL)))
    table = {"user_id": np.array(users), "item_id": items, "rating": np.array(ratings)}
    assert rows_of(ready(InteractionsDataModule(table, **SMALL))) == expected
    text = table | {"item_id": np.array([f"m{i}" for i in items], object)}
    named = {
        stage: [(u, [f"m{i}" for i in h], [f"m{i}" for i in t]) for u, h, t in rows] for stage, rows in expected.items()
    }
    assert rows_of(ready(InteractionsDataModule(text, **SMALL))) == named
    everything = ready(InteractionsDataModule(table, rating_column=None, min_rating=None, **SMALL))
    assert len(everything.user_ids) == 60
    with pytest.raises(ValueError, match="interactions has no column 'who'"):
        InteractionsDataModule(table, user_column="who").setup("fit")
    with pytest.raises(ValueError, match="must be equally long"):
        InteractionsDataModule(table | {"item_id": items[1:]}).setup("fit")
    with pytest.raises(ValueError, match="cache_dir='x': must be None for interactions in memory"):
        InteractionsDataModule(table, cache_dir="x").prepare_data()


def test_repeated_pairs_count_once_or_add_up(tmp_path) -> None:
    path = tmp_path / "t.csv"
    events = [event for event in synthetic() for _ in range(2)]
    path.write_text(ratings_csv(events, "user_id,item_id,rating,timestamp"))
    once = tmp_path / "once.csv"
    once.write_text(ratings_csv(synthetic(), "user_id,item_id,rating,timestamp"))
    assert rows_of(ready(InteractionsDataModule(str(path), **SMALL))) == rows_of(
        ready(InteractionsDataModule(str(once), **SMALL))
    )
    twice = ready(InteractionsDataModule(str(path), binarize=False, **SMALL)).histories.values
    torch.testing.assert_close(
        twice, 2 * ready(InteractionsDataModule(str(once), binarize=False, **SMALL)).histories.values
    )


def test_sparse_matrices(tmp_path) -> None:
    events = synthetic()
    users, items, ratings = map(np.array, zip(*events, strict=True))
    matrix = sparse.csr_array((ratings, (users, items)))
    in_memory = ready(InteractionsDataModule(matrix, **SMALL))
    sparse.save_npz(tmp_path / "m.npz", matrix)
    assert rows_of(in_memory) == rows_of(ready(InteractionsDataModule(str(tmp_path / "m.npz"), **SMALL)))
    by_row = sorted(events)
    expected = authors_split(by_row, heldout=8, least=10)
    assert in_memory.item_ids.tolist() == expected.pop("items")
    assert rows_of(in_memory) == expected
    with pytest.raises(ValueError, match="cache_dir='x': must be None for interactions in memory"):
        InteractionsDataModule(matrix, cache_dir="x").prepare_data()


def test_cache(tmp_path) -> None:
    write_u_data(tmp_path)
    options: dict[str, Any] = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache"), **SMALL}
    first = ready(MovieLensDataModule("100k", **options))
    [file] = (tmp_path / "cache").iterdir()
    stamp = file.stat().st_mtime_ns
    again = MovieLensDataModule("100k", **options)
    again._read = lambda: pytest.fail("read the file in spite of the cache")  # type: ignore[method-assign]
    assert rows_of(ready(again)) == rows_of(first)
    assert file.stat().st_mtime_ns == stamp
    ready(MovieLensDataModule("100k", **options | {"min_user_interactions": 11}))
    write_u_data(tmp_path, users=61)
    ready(MovieLensDataModule("100k", **options))
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert not list((tmp_path / "cache").glob("*.part"))


def test_users_with_few_known_items_have_no_targets() -> None:
    """User 9 is held out with four known items; all have at least five."""
    x = np.zeros((10, 12))
    x[:, :6] = 5
    x[9] = 0
    x[9, [0, 1, 2, 3, 8, 9]] = 5
    for seed in range(40):  # until user 9 is in the test part
        data = ready(InteractionsDataModule(sparse.csr_array(x), num_heldout_users=2, split_seed=seed))
        if 9 in [user for user, *_ in rows_of(data)["test"]]:
            break
    assert rows_of(data)["test"][1] == (9, [0, 1, 2, 3], [])


@pytest.mark.parametrize(("items", "fraction"), [(4, 0.2), (9, 0.1)])
def test_a_split_in_which_nobody_has_a_target_is_refused(items, fraction) -> None:
    data = InteractionsDataModule(
        sparse.csr_array(np.ones((30, items))), min_rating=None, min_user_interactions=1, num_heldout_users=10,
        target_fraction=fraction,
    )  # fmt: skip
    with pytest.raises(ValueError, match="None of the 10 validation users has a target"):
        data.setup("fit")


def write_ids(path: Path, ids: list[str]) -> None:
    path.write_text("user_id,item_id,rating\n" + "".join(f"{u},{i},5\n" for u in range(12) for i in ids))


@pytest.mark.parametrize("odd", ["007", "+7", "-0", '"0010"'])
def test_ids_that_only_look_like_numbers_stay_text(odd, tmp_path) -> None:
    ids = [odd, "7", "0", "10", "11", "12"]
    write_ids(tmp_path / "t.csv", ids)
    data = ready(InteractionsDataModule(tmp_path / "t.csv", num_heldout_users=2))
    assert sorted(data.item_ids.tolist()) == sorted(x.strip('"') for x in ids)
    assert data.user_ids.dtype.kind == "i"


def test_numbers_elsewhere_with_leading_zeros_leave_ids_numbers(tmp_path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "\n".join(["user_id,item_id,rating,day", *(f"{u},{i},5.0,01-02" for u in range(12) for i in range(6))])
    )
    data = ready(InteractionsDataModule(path, num_heldout_users=2))
    assert data.item_ids.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("missing", ["", "nan", "None", " "])
@pytest.mark.parametrize("other", ["{}", "u{}"])
def test_missing_ids_are_named_by_row(missing, other, tmp_path) -> None:
    users = [other.format(u) for u in range(1, 12)]
    users[4] = missing
    path = tmp_path / "t.csv"
    path.write_text("user_id,item_id,rating\n" + "".join(f"{u},3,5\n" for u in users))
    with pytest.raises(ValueError, match=r"t\.csv, row 5: the user id is missing"):
        InteractionsDataModule(path).setup("fit")
    table = {"user_id": np.array(users, object), "item_id": np.arange(11), "rating": np.full(11, 5)}
    with pytest.raises(ValueError, match="interactions, row 5: the user id is missing"):
        InteractionsDataModule(table).setup("fit")
    for gap in (None, float("nan")):
        table["user_id"][4] = gap
        with pytest.raises(ValueError, match="interactions, row 5: the user id is missing"):
            InteractionsDataModule(table).setup("fit")
    numbers = np.arange(11.0)
    numbers[4] = np.nan
    with pytest.raises(ValueError, match="interactions, row 5: the user id is missing"):
        InteractionsDataModule(table | {"user_id": numbers}).setup("fit")


def test_integers_of_any_dtype_are_ordered_as_numbers() -> None:
    users, items, ratings = (np.array(column) for column in zip(*synthetic(users=80), strict=True))
    expected = rows_of(ready(InteractionsDataModule({"user_id": users, "item_id": items, "rating": ratings}, **SMALL)))
    for kind in (object, float):
        table = {"user_id": users.astype(kind), "item_id": items, "rating": ratings.astype(str)}
        assert rows_of(ready(InteractionsDataModule(table, **SMALL))) == expected


@pytest.mark.parametrize(
    ("rating", "message"),
    [("good", "could not convert"), ("nan", "row 3: the rating must be finite, got nan"), ("inf", "got inf")],
)
@pytest.mark.parametrize("min_rating", [None, 4.0])
def test_ratings_must_be_finite_numbers(rating, message, min_rating, tmp_path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"user_id,item_id,rating\n1,2,5\n1,3,5\n2,3,{rating}\n")
    table = {"user_id": [1, 1, 2], "item_id": [2, 3, 3], "rating": np.array(["5", "5", rating])}
    for source, name in ((path, r"t\.csv"), (table, "interactions|rating_column='rating' must hold numbers")):
        data = InteractionsDataModule(source, min_rating=min_rating, binarize=False)
        with pytest.raises(ValueError, match=f"(?s)({name}).*{message}"):
            data.setup("fit")
    matrix = sparse.csr_array(np.array([[1.0, 2.0], [0.0, np.nan]]))
    with pytest.raises(ValueError, match="must be finite, got nan in row 1, column 1"):
        InteractionsDataModule(matrix, min_rating=min_rating).setup("fit")


def test_without_ratings_every_event_counts() -> None:
    users, items, _ = (np.array(column) for column in zip(*synthetic(), strict=True))
    data = ready(InteractionsDataModule({"user_id": users, "item_id": items}, rating_column=None, **SMALL))
    assert len(data.user_ids) == 60


def test_files_without_names_are_read_by_place(tmp_path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\n".join(f"{i},{r},{u}" for u, i, r in synthetic()))
    named = tmp_path / "named.csv"
    named.write_text(ratings_csv(synthetic(), "user_id,item_id,rating,timestamp"))
    places: dict[str, Any] = {"user_column": 2, "item_column": 0, "rating_column": 1}
    assert rows_of(ready(InteractionsDataModule(path, **places, **SMALL))) == rows_of(
        ready(InteractionsDataModule(named, **SMALL))
    )
    with pytest.raises(ValueError, match="For a file without names, give the columns' places"):
        InteractionsDataModule(path).setup("fit")
    with pytest.raises(ValueError, match="must all be names, or all places"):
        InteractionsDataModule(path, user_column=2)


def test_damaged_files_are_named(tmp_path) -> None:
    sparse.save_npz(tmp_path / "m.npz", sparse.csr_array(np.ones((9, 9))))
    whole = (tmp_path / "m.npz").read_bytes()
    for damaged in (whole[:100], whole[:-30], b"", b"text"):
        (tmp_path / "m.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"m\.npz is damaged or not a scipy sparse matrix"):
            InteractionsDataModule(tmp_path / "m.npz").setup("fit")
    with zipfile.ZipFile(tmp_path / "ml-20m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ml-20m/ratings.csv", ratings_csv(synthetic()))
    content = bytearray((tmp_path / "ml-20m.zip").read_bytes())
    content[200] ^= 255
    (tmp_path / "ml-20m.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"ml-20m\.zip:ml-20m/ratings\.csv"):
        MovieLensDataModule("20m", str(tmp_path)).setup("fit")
    (tmp_path / "latin.csv").write_bytes("user_id,item_id,rating\n1,Amélie,5\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv, row 1: the item id is not UTF-8"):
        InteractionsDataModule(tmp_path / "latin.csv").setup("fit")


def test_archives_that_unpack_to_far_too_much_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lit_methods.datamodules.reading._ALWAYS", 10_000)
    with zipfile.ZipFile(tmp_path / "ml-20m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ml-20m/ratings.csv", "userId,movieId,rating,timestamp\n" + 100_000 * "1,1,5.0,0\n")
    with pytest.raises(ValueError, match=r"ml-20m/ratings\.csv would unpack from \d+ to 1000032 bytes"):
        MovieLensDataModule("20m", str(tmp_path)).setup("fit")


def test_a_damaged_cache_is_made_anew(tmp_path) -> None:
    write_u_data(tmp_path)
    options: dict[str, Any] = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache"), **SMALL}
    first = ready(MovieLensDataModule("100k", **options))
    [file] = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", b"text", whole[:500]):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"\.npz is damaged.* It is made anew"):
            assert rows_of(ready(MovieLensDataModule("100k", **options))) == rows_of(first)
        assert file.read_bytes() == whole


def test_bad_files(tmp_path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("user,item\n1,2\n")
    with pytest.raises(
        ValueError, match=r"has no column 'user_id', 'item_id', 'rating'; its first line names \['user'"
    ):
        InteractionsDataModule(str(path)).setup("fit")
    path.write_text("user_id,item_id,rating\n1,2,5\n3,4\n")
    with pytest.raises(ValueError, match=r"t\.csv, after line 1: "):
        InteractionsDataModule(str(path)).setup("fit")
    path.write_text("user_id,item_id,rating\n")
    with pytest.raises(ValueError, match="No user is left: of 0 interactions with at least min_rating, none passes"):
        InteractionsDataModule(str(path), num_heldout_users=3).setup("fit")
    with pytest.raises(FileNotFoundError, match="pass interactions=<path of your table"):
        InteractionsDataModule(str(tmp_path / "none.csv")).setup("fit")
    path.write_text(ratings_csv(synthetic(), "user_id,item_id,rating,timestamp"))
    with pytest.raises(ValueError, match=r"num_heldout_users=30: must be < \d+(\.5)?: the filters leave"):
        InteractionsDataModule(str(path), num_heldout_users=30).setup("fit")
    with pytest.raises(ValueError, match="values are counts and must be >= 0"):
        InteractionsDataModule(sparse.csr_array(-np.ones((9, 9))), min_rating=None, binarize=False).setup("fit")


def test_large_files_are_read_in_pieces(tmp_path, monkeypatch) -> None:
    write_u_data(tmp_path)
    whole = rows_of(ready(MovieLensDataModule("100k", str(tmp_path), **SMALL)))
    monkeypatch.setattr("lit_methods.datamodules.interactions.files._LINES", 17)
    assert rows_of(ready(MovieLensDataModule("100k", str(tmp_path), **SMALL))) == whole


def test_real_movielens_100k_has_the_published_counts() -> None:
    """The file in recbole's wheel, where it is installed."""
    data = MovieLensDataModule("100k", "no-such-folder", download=False, num_heldout_users=150)
    try:
        ready(data)
    except FileNotFoundError:
        pytest.skip("recbole is not installed")
    h, train = data.histories, len(data.train_data.rows)
    assert (train, data.num_items, int(h.offsets[train])) == (638, 1392, 38146)
    test = train + 150
    counts = [int(offsets[-1] - offsets[test]) for offsets in (h.offsets, h.target_offsets)]
    assert counts == [6814, 1629]


def test_archives_are_not_unpacked(tmp_path) -> None:
    buffer = io.StringIO(ratings_csv(synthetic()))
    with zipfile.ZipFile(tmp_path / "ml-20m.zip", "w") as archive:
        archive.writestr("ml-20m/ratings.csv", buffer.getvalue())
    ready(MovieLensDataModule("20m", str(tmp_path), **SMALL))
    assert [path.name for path in Path(tmp_path).iterdir()] == ["ml-20m.zip"]
