"""Forest cover types in the order of their file: a long, drifting stream of real data."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lit_methods.batches import OnlineRound
from lit_methods.datamodules.download import fetch
from lit_methods.datamodules.reading import open_unpacked, reading
from lit_methods.datamodules.synthetic.online_streams import _OnlineDataModule
from lit_methods.datamodules.tensors import check_int


class CovertypeDataModule(_OnlineDataModule):
    """Cover type 2 (lodgepole pine) against all others, as rounds of :class:`~lit_methods.batches.OnlineRound`.

    The 581,012 places of the UCI data set come in the order of their file, in which regions follow one another: that is
    the drift. Features are the 54 columns, standardised over the whole file, and a constant, scaled to norm at most 1;
    targets are 1 and -1, for ``logistic`` or ``hinge``. Rank r begins r/64 of the file later. There is no known best
    point in a round: the comparator is 0.

    Args:
        data_dir: folder with ``covtype.data.gz`` or ``covtype.data`` (also in a folder ``covertype`` there).
        download: fetch ``covtype.data.gz`` (11 MB) in ``prepare_data`` when both are missing.
        samples_per_round: places a round on each rank, >= 1.
        num_workers: loader processes, >= 0.

    Raises:
        ValueError: an argument out of range, or a file that is damaged or not what its name says.
        FileNotFoundError: in ``setup``, when the data set is not there; says where it should be and how to get it.
    """

    dim = 55
    mirrors: ClassVar[tuple[str, ...]] = (
        "https://ndownloader.figshare.com/files/5976039",
        "https://archive.ics.uci.edu/ml/machine-learning-databases/covtype/covtype.data.gz",
    )
    sha256: ClassVar[str] = "614360d0257557dd1792834a85a1cdebfadc3c4f30b011d56afee7ffb5b15771"

    def __init__(
        self,
        data_dir: str | Path = "data/covertype",
        download: bool = True,
        samples_per_round: int = 10,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=1, num_workers=num_workers)
        self.data_dir = Path(data_dir)
        self.download = download
        self.samples_per_round = check_int("samples_per_round", samples_per_round, 1)
        self._data: tuple[Tensor, Tensor] | None = None

    def prepare_data(self) -> None:
        """Download the file, if it is missing and that is asked for."""
        if self.download and self._find() is None:
            try:
                fetch(self.mirrors, self.data_dir / "covtype.data.gz", sha256=self.sha256)
            except OSError as error:
                raise FileNotFoundError(self._explain(f" The download failed: {error}")) from error

    def setup(self, stage: str) -> None:
        """Read and scale the data."""
        if self._data is None:
            if (path := self._find()) is None:
                raise FileNotFoundError(self._explain())
            with reading(path, "the cover type table"), open_unpacked(path) as file:
                table = np.loadtxt(file, delimiter=",", ndmin=2)
            x, y = table[:, :-1], table[:, -1]
            if x.shape[1] != self.dim - 1 or not np.isfinite(x).all() or not np.isin(y, np.arange(1, 8)).all():
                raise ValueError(
                    f"{path} must hold {self.dim - 1} finite numbers and a cover type from 1 to 7 in each line, got "
                    f"{table.shape[1]} columns"
                )
            deviations = x.std(0)
            scaled = (x - x.mean(0)) / np.where(deviations > 0, deviations, 1)
            features = np.concatenate([scaled, np.ones((len(x), 1))], 1)
            features /= np.linalg.norm(features, axis=1).max()
            self._data = torch.from_numpy(features).float(), torch.from_numpy(np.where(y == 2, 1.0, -1.0)).float()
        self.rounds = len(self._data[0]) // self.samples_per_round
        super().setup(stage)

    def stream(self, epoch: int = 0, rank: int = 0) -> OnlineRound:
        """All rounds as this rank sees them: every tensor with a leading dimension ``rounds``."""
        assert self._data is not None
        features, targets = self._data
        rows = (torch.arange(self.rounds * self.samples_per_round) + rank * (len(targets) // 64)) % len(targets)
        shape = (self.rounds, self.samples_per_round)
        return OnlineRound(
            features[rows].view(*shape, self.dim), targets[rows].view(shape), torch.zeros(self.rounds, self.dim)
        )

    def _find(self) -> Path | None:
        folders = (self.data_dir, self.data_dir / "covertype")
        files = [folder / name for folder in folders for name in ("covtype.data.gz", "covtype.data")]
        return next((file for file in files if file.is_file()), None)

    def _explain(self, reason: str = "") -> str:
        return (
            f"CovertypeDataModule lacks covtype.data.gz in {self.data_dir.absolute()}. Put {self.mirrors[1]} there, or "
            f"set download: true. (Files that scikit-learn made of it are pickles, which are not read.){reason}"
        )
