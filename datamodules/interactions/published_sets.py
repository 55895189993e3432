"""MovieLens, the Netflix Prize and the Million Song Dataset's taste profiles, as interactions of users with items."""

import importlib.metadata
import zipfile
from pathlib import Path
from typing import ClassVar

from lit_methods.datamodules.download import fetch
from lit_methods.datamodules.interactions.datamodule import InteractionsDataModule
from lit_methods.datamodules.interactions.files import Events, read_netflix, read_table
from lit_methods.datamodules.reading import reading

_TABLES: dict[str, tuple[str, tuple[str | int, str | int, str | int]]] = {
    "ratings.csv": (",", ("userId", "movieId", "rating")),
    "ratings.dat": ("::", (0, 1, 2)),
    "u.data": ("\t", (0, 1, 2)),
    ".inter": ("\t", ("user_id", "item_id", "rating")),
}


class MovieLensDataModule(InteractionsDataModule):
    """MovieLens (Harper and Konstan, 2015), any size, with the split of :class:`InteractionsDataModule`.

    The ratings are found in ``data_dir`` (or in its folder ``ml-<version>``) as ``ratings.csv``, ``ratings.dat``,
    ``u.data`` or RecBole's ``ml-<version>.inter``; or in ``ml-<version>.zip`` there, which is read without unpacking.
    For ``100k`` also in an installed ``recbole`` (``pip install --no-deps recbole``), whose wheel holds the data.
    Otherwise ``prepare_data`` downloads GroupLens' archive (checked against its MD5; an interrupted download carries
    on). MovieLens' licence forbids to redistribute the files.

    Args:
        version: "100k", "1m", "10m", "20m", "25m", "32m" or "latest-small" (which changes, so it has no checksum).
        data_dir: see above; it may also be the path of the file or archive itself.
        download: whether to download what is missing.
        min_rating: smallest rating that counts as an interaction; None: any. The authors: 4 of 5 stars.
        min_user_interactions: users with fewer are dropped, >= 1.
        min_item_interactions: items with fewer are dropped, >= 0.
        num_heldout_users: users for validation, and again as many for the test, >= 1. The default is for 20m. The
            smaller versions need less.
        target_fraction: share of a held-out user's items to be recommended, in (0, 1).
        split_seed: seed of the split, >= 0.
        cache_dir: folder for the processed data (rank zero writes it in ``prepare_data``), which is read instead of the
            file while settings and file stay the same; None: none.
        batch_size: users per training batch on each rank, >= 1.
        eval_batch_size: users per evaluation batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the order of training users, >= 0.

    Raises:
        ValueError: an unknown ``version``, an argument out of range, or in ``setup`` ratings that cannot be split so.
        FileNotFoundError: the ratings are not there and cannot be downloaded; says which file, where, how to get it.
    """

    mirrors: ClassVar[tuple[str, ...]] = ("https://files.grouplens.org/datasets/movielens/",)
    md5: ClassVar[dict[str, str | None]] = {
        "100k": "0e33842e24a9c977be4e0107933c0723",
        "1m": "c4d9eecfca2ab87c1945afe126590906",
        "10m": "ce571fd55effeba0271552578f2648bd",
        "20m": "cd245b17a1ae2cc31bb14903e1204af3",
        "25m": "6b51fb2759a8657d3bfcbfc42b592ada",
        "32m": "d472be332d4daa821edc399621853b57",
        "latest-small": None,
    }

    def __init__(
        self,
        version: str = "20m",
        data_dir: str = "data/movielens",
        download: bool = True,
        min_rating: float | None = 4.0,
        min_user_interactions: int = 5,
        min_item_interactions: int = 0,
        num_heldout_users: int = 10_000,
        target_fraction: float = 0.2,
        split_seed: int = 98765,
        cache_dir: str | None = None,
        batch_size: int = 500,
        eval_batch_size: int = 2000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            data_dir,
            min_rating=min_rating,
            min_user_interactions=min_user_interactions,
            min_item_interactions=min_item_interactions,
            num_heldout_users=num_heldout_users,
            target_fraction=target_fraction,
            split_seed=split_seed,
            cache_dir=cache_dir,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        if version not in self.md5:
            raise ValueError(f"Invalid version={version!r}: must be one of {', '.join(self.md5)}.")
        self.version = version
        self.data_dir = Path(data_dir)
        self.download = download

    def prepare_data(self) -> None:
        """Download the archive if the ratings are not there, then as in :class:`InteractionsDataModule`."""
        if self.download and self._find() is None:
            archive = f"ml-{self.version}.zip"
            try:
                urls = [mirror + archive for mirror in self.mirrors]
                fetch(urls, self.data_dir / archive, self.md5[self.version])
            except OSError as error:
                raise FileNotFoundError(self._explain(f"\nThe download failed: {error}")) from error
        super().prepare_data()

    def _sources(self) -> list[Path]:
        if (found := self._find()) is None:
            raise FileNotFoundError(self._explain())
        return [found[0]]

    def _read(self) -> Events:
        if (found := self._find()) is None:
            raise FileNotFoundError(self._explain())
        path, member = found
        name = member or path.name
        delimiter, columns = next(table for ending, table in _TABLES.items() if name.endswith(ending))
        return read_table(path, columns, delimiter, self.min_rating, member)

    def _find(self) -> tuple[Path, str | None] | None:
        """The file with the ratings, and its name in there if it is an archive."""
        folder = self.data_dir
        if folder.is_file():
            return _in_archive(folder) if folder.suffix == ".zip" else (folder, None)
        name = f"ml-{self.version}"
        files = [f"{name}.inter", *(file for file in _TABLES if file[0] != ".")]
        places = [place / file for place in (folder / name, folder / "ml-10M100K", folder) for file in files]
        for path in places:
            if path.is_file() and (self.version == "10m" or path.parent.name != "ml-10M100K"):
                return path, None
        if (archive := folder / f"{name}.zip").is_file():
            return _in_archive(archive)
        elsewhere = _recbole_files() if self.version == "100k" else []
        return (elsewhere[0], None) if elsewhere else None

    def _explain(self, reason: str = "") -> str:
        recbole = " Or pip install --no-deps recbole, whose wheel holds the file." if self.version == "100k" else ""
        return (
            f"MovieLensDataModule lacks the ratings of MovieLens {self.version} in {self.data_dir.absolute()}. Put "
            f"{self.mirrors[0]}ml-{self.version}.zip there (no need to unpack it), or set data_dir to where it is."
            f"{recbole}{reason}"
        )


def _in_archive(path: Path) -> tuple[Path, str]:
    with reading(path, "a zip archive"), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for name in names:
        if name.rpartition("/")[2] in _TABLES or name.endswith(".inter"):
            return path, name
    raise ValueError(f"{path} holds no ratings.csv, ratings.dat, u.data or .inter file, only {names[:10]}.")


def _recbole_files() -> list[Path]:
    try:
        files = importlib.metadata.files("recbole") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [
        Path(str(file.locate()))
        for file in files
        if file.name == "ml-100k.inter" and Path(str(file.locate())).is_file()
    ]


class NetflixPrizeDataModule(InteractionsDataModule):
    """The Netflix Prize (2006), with the split of :class:`InteractionsDataModule`.

    ``data_dir`` holds ``combined_data_1.txt`` to ``_4.txt``, or ``mv_*.txt``, also in a folder ``training_set``.
    Netflix has withdrawn the data, so nothing is downloaded.

    Args:
        data_dir: see above.
        min_rating: smallest rating that counts as an interaction; None: any. The authors: 4 of 5 stars.
        min_user_interactions: users with fewer are dropped, >= 1.
        min_item_interactions: items with fewer are dropped, >= 0.
        num_heldout_users: users for validation, and again as many for the test, >= 1.
        target_fraction: share of a held-out user's items to be recommended, in (0, 1).
        split_seed: seed of the split, >= 0.
        cache_dir: folder for the processed data (rank zero writes it in ``prepare_data``), which is read instead of the
            file while settings and file stay the same; None: none. Recommended, for the 100 million lines.
        batch_size: users per training batch on each rank, >= 1.
        eval_batch_size: users per evaluation batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the order of training users, >= 0.

    Raises:
        ValueError: an argument out of range, or in ``setup`` interactions that cannot be split so.
        FileNotFoundError: says which files are missing, and where.
    """

    def __init__(
        self,
        data_dir: str = "data/netflix",
        min_rating: float | None = 4.0,
        min_user_interactions: int = 5,
        min_item_interactions: int = 0,
        num_heldout_users: int = 40_000,
        target_fraction: float = 0.2,
        split_seed: int = 98765,
        cache_dir: str | None = None,
        batch_size: int = 500,
        eval_batch_size: int = 2000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            data_dir,
            min_rating=min_rating,
            min_user_interactions=min_user_interactions,
            min_item_interactions=min_item_interactions,
            num_heldout_users=num_heldout_users,
            target_fraction=target_fraction,
            split_seed=split_seed,
            cache_dir=cache_dir,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.data_dir = Path(data_dir)

    def _sources(self) -> list[Path]:
        for pattern in ("combined_data_*.txt", "mv_*.txt", "training_set/mv_*.txt"):
            if files := sorted(self.data_dir.glob(pattern)):
                return files
        raise FileNotFoundError(
            f"NetflixPrizeDataModule found neither combined_data_*.txt nor mv_*.txt in {self.data_dir.absolute()}. Get "
            "them from whoever still has them (Netflix withdrew the data), and unpack them there."
        )

    def _read(self) -> Events:
        return read_netflix(self._sources(), self.min_rating)


class MSDTasteProfileDataModule(InteractionsDataModule):
    """The Million Song Dataset's taste profiles (2011), with the split of :class:`InteractionsDataModule`.

    Any number of plays counts as one interaction. Songs with fewer than 200 listeners are dropped, then users with
    fewer than 20 songs. ``data_dir`` holds ``train_triplets.txt`` or ``train_triplets.txt.zip`` from
    http://millionsongdataset.com/tasteprofile (no checksum is published, so nothing is downloaded).

    Args:
        data_dir: see above.
        min_user_interactions: users with fewer are dropped, >= 1.
        min_item_interactions: items with fewer are dropped, >= 0.
        num_heldout_users: users for validation, and again as many for the test, >= 1.
        target_fraction: share of a held-out user's items to be recommended, in (0, 1).
        binarize: every interaction counts 1; False: values are counts (the sum over repeated pairs). False: numbers of
            plays.
        split_seed: seed of the split, >= 0.
        cache_dir: folder for the processed data (rank zero writes it in ``prepare_data``), which is read instead of the
            file while settings and file stay the same; None: none. Recommended, for the 48 million lines.
        batch_size: users per training batch on each rank, >= 1.
        eval_batch_size: users per evaluation batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the order of training users, >= 0.

    Raises:
        ValueError: an argument out of range, or in ``setup`` interactions that cannot be split so.
        FileNotFoundError: says which file is missing, where, and how to get it.
    """

    def __init__(
        self,
        data_dir: str = "data/msd",
        min_user_interactions: int = 20,
        min_item_interactions: int = 200,
        num_heldout_users: int = 50_000,
        target_fraction: float = 0.2,
        binarize: bool = True,
        split_seed: int = 98765,
        cache_dir: str | None = None,
        batch_size: int = 500,
        eval_batch_size: int = 2000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            data_dir,
            min_rating=None,
            min_user_interactions=min_user_interactions,
            min_item_interactions=min_item_interactions,
            num_heldout_users=num_heldout_users,
            target_fraction=target_fraction,
            binarize=binarize,
            split_seed=split_seed,
            cache_dir=cache_dir,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.data_dir = Path(data_dir)

    def _sources(self) -> list[Path]:
        for name in ("train_triplets.txt", "train_triplets.txt.zip"):
            if (path := self.data_dir / name).is_file():
                return [path]
        raise FileNotFoundError(
            f"MSDTasteProfileDataModule lacks train_triplets.txt in {self.data_dir.absolute()}. Put "
            "http://millionsongdataset.com/sites/default/files/challenge/train_triplets.txt.zip "
            "there (no need to unpack it)."
        )

    def _read(self) -> Events:
        [path] = self._sources()
        member = "train_triplets.txt" if path.suffix == ".zip" else None
        return read_table(path, (0, 1, 2), "\t", None, member)
