"""Forest cover types in the order of their file: a long, drifting stream of real data."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from sklearn.datasets import fetch_covtype
from torch import Tensor

from lit_methods.batches import OnlineRound
from lit_methods.datamodules.synthetic.online_streams import _OnlineDataModule
from lit_methods.datamodules.tensors import check_int


class CovertypeDataModule(_OnlineDataModule):
    """Cover type 2 (lodgepole pine) against all others, as rounds of :class:`~lit_methods.batches.OnlineRound`.

    The 581,012 places of the UCI data set come in the order of their file, in which regions follow one another: that is
    the drift. Features are the 54 columns, standardised over the whole file, and a constant, scaled to norm at most 1;
    targets are 1 and -1, for ``logistic`` or ``hinge``. Rank r begins r/64 of the file later. There is no known best
    point in a round: the comparator is 0.

    Args:
        data_dir: folder where scikit-learn keeps its data sets; None for its own default.
        download: fetch the file (11 MB) in ``prepare_data`` when it is missing.
        samples_per_round: places a round on each rank, >= 1.
        num_workers: loader processes, >= 0.

    Raises:
        ValueError: an argument out of range.
        FileNotFoundError: in ``setup``, when the data set is not there.
    """

    dim = 55

    def __init__(
        self,
        data_dir: str | Path | None = None,
        download: bool = True,
        samples_per_round: int = 10,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=1, num_workers=num_workers)
        self.data_dir = data_dir
        self.download = download
        self.samples_per_round = check_int("samples_per_round", samples_per_round, 1)
        self._data: tuple[Tensor, Tensor] | None = None

    def prepare_data(self) -> None:
        """Let scikit-learn download the file, if that is asked for."""
        if self.download:
            try:
                fetch_covtype(data_home=self.data_dir)
            except URLError as error:
                raise OSError(f"{error}; {_explain(self.data_dir)}") from error

    def setup(self, stage: str) -> None:
        """Read and scale the data."""
        if self._data is None:
            try:
                x, y = fetch_covtype(data_home=self.data_dir, download_if_missing=False, return_X_y=True)
            except OSError as error:
                raise FileNotFoundError(_explain(self.data_dir)) from error
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


def _explain(data_dir: str | Path | None) -> str:
    place = "scikit-learn's data folder" if data_dir is None else str(data_dir)
    return (
        f"the cover type data set is not in {place}: run sklearn.datasets.fetch_covtype(data_home=...) where there is "
        "a network and copy its folder 'covertype' there, or set download: true"
    )
