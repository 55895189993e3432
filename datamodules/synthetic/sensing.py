"""Low-rank matrices behind near-isotropic linear measurements, drawn from a seed."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.batches import EntriesBatch, MatrixBatch, RankOneBatch, SensingBatch
from lit_methods.datamodules.tensors import ShuffledSampler, TensorDataModule, TensorRows, check_int


class SensingDataModule(TensorDataModule):
    """Measurements ``y_i = <A_i, M> + noise`` of a random matrix ``M`` of low rank; the problem is the data.

    ``M = U diag(s) V^T`` has random orthonormal ``U`` and ``V`` (``V = U`` when symmetric) and singular values ``s``
    that fall geometrically from 1 to ``1 / condition_number``. Training batches are
    :class:`~lit_methods.batches.SensingBatch` (``gaussian``: ``A_i`` with independent N(0, 1) entries, on symmetric
    matrices the same as their symmetric parts), :class:`~lit_methods.batches.RankOneBatch` (``rank_one``: ``a_i b_i^T``
    of such vectors, whose heavier tails want smaller steps) or :class:`~lit_methods.batches.EntriesBatch` (``entries``,
    drawn without replacement). With all ``rows * columns`` entries the problem is matrix factorisation. Validation,
    test and prediction batches are one :class:`~lit_methods.batches.MatrixBatch` with ``M``, on every rank.

    By default a batch is all measurements of the rank, ``steps_per_epoch`` times an epoch: full-batch gradient descent.

    Args:
        rows: rows of ``M``, >= 1.
        columns: columns of ``M``, >= 1; ``None``: as many as rows.
        rank: rank ``r`` of ``M``, in [1, min(rows, columns)].
        num_measurements: number of measurements ``m``, >= 1, at most rows * columns for entries; ``None``: rows *
            columns.
        measurements: ``"gaussian"``, ``"rank_one"`` or ``"entries"``.
        symmetric: ``M`` is symmetric and positive semi-definite.
        condition_number: largest over smallest singular value of the signal, >= 1.
        noise_std: standard deviation of the Gaussian noise on ``y_i``, >= 0.
        batch_size: measurements per batch on each rank, >= 1; ``None``: all of them.
        steps_per_epoch: batches per epoch when ``batch_size`` is ``None``, >= 1.
        dtype: floating point type. Squared errors below 1e-12 need float64 and ``precision: 64-true``.
        seed: seed of the matrix, the measurements and the order of mini-batches, >= 0.
        num_workers: loader processes for mini-batches, >= 0.

    Raises:
        ValueError: an argument out of range; ranks that do not divide the measurements of a full batch.
    """

    def __init__(
        self,
        rows: int = 50,
        columns: int | None = None,
        rank: int = 3,
        num_measurements: int | None = 2500,
        measurements: Literal["gaussian", "rank_one", "entries"] = "gaussian",
        symmetric: bool = True,
        condition_number: float = 1.0,
        noise_std: float = 0.0,
        batch_size: int | None = None,
        steps_per_epoch: int = 100,
        dtype: Literal["float32", "float64"] = "float32",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=1 if batch_size is None else batch_size, seed=seed, num_workers=num_workers)
        self.rows = check_int("rows", rows, 1)
        self.columns = rows if columns is None else check_int("columns", columns, 1)
        self.rank = check_int("rank", rank, 1, min(self.rows, self.columns))
        if measurements not in ("gaussian", "rank_one", "entries"):
            raise ValueError(f"Invalid measurements={measurements!r}: must be 'gaussian', 'rank_one' or 'entries'.")
        if symmetric and self.rows != self.columns:
            raise ValueError(
                f"Invalid symmetric=True with {self.rows} rows and {self.columns} columns: must be square."
            )
        if not 1 <= condition_number < float("inf"):
            raise ValueError(f"Invalid condition_number={condition_number}: must be >= 1 and finite.")
        if not 0 <= noise_std < float("inf"):
            raise ValueError(f"Invalid noise_std={noise_std}: must be >= 0 and finite.")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"Invalid dtype={dtype!r}: must be 'float32' or 'float64'.")
        entries = self.rows * self.columns
        most = entries if measurements == "entries" else None
        given = entries if num_measurements is None else num_measurements
        self.num_measurements = check_int("num_measurements", given, 1, most)
        self.measurements = measurements
        self.symmetric = symmetric
        self.condition_number = condition_number
        self.noise_std = noise_std
        self.full_batch = batch_size is None
        self.steps_per_epoch = check_int("steps_per_epoch", steps_per_epoch, 1)
        self.dtype: torch.dtype = getattr(torch, dtype)

    def setup(self, stage: str) -> None:
        """Draw the matrix, then the measurements."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        u = torch.linalg.qr(normal(self.rows, self.rank)).Q
        v = u if self.symmetric else torch.linalg.qr(normal(self.columns, self.rank)).Q
        exponents = torch.arange(self.rank, dtype=torch.float64) / max(self.rank - 1, 1)
        matrix = u * self.condition_number**-exponents @ v.T
        data: SensingBatch | RankOneBatch | EntriesBatch
        if self.measurements == "gaussian":
            a = normal(self.num_measurements, self.rows, self.columns)
            data = SensingBatch(a.to(self.dtype), a.flatten(1) @ matrix.flatten())
        elif self.measurements == "rank_one":
            a, b = normal(self.num_measurements, self.rows), normal(self.num_measurements, self.columns)
            data = RankOneBatch(a.to(self.dtype), b.to(self.dtype), (a @ matrix * b).sum(1))
        else:
            entries = torch.randperm(self.rows * self.columns, generator=generator)[: self.num_measurements]
            scale = (self.rows * self.columns) ** 0.5
            data = EntriesBatch(entries // self.columns, entries % self.columns, scale * matrix.flatten()[entries])
        noise = self.noise_std * normal(self.num_measurements)
        self.train_data = data._replace(values=(data.values + noise).to(self.dtype))
        self.val_data = self.test_data = MatrixBatch(matrix[None].to(self.dtype))

    def train_dataloader(self) -> StatefulDataLoader:
        """Return a loader over mini-batches, or over ``steps_per_epoch`` times this rank's whole share."""
        if not self.full_batch or self.train_data is None:
            return super().train_dataloader()
        world_size, rank = self._ranks()
        if self.num_measurements % world_size:
            raise ValueError(
                f"{self.num_measurements} measurements do not divide into equal shares for {world_size} ranks, so the "
                "mean of gradients would not be the gradient: change num_measurements or devices"
            )
        share = self.train_data._make(tensor[rank::world_size] for tensor in self.train_data)  # type: ignore[attr-defined]
        rows = _Repeated(share, self.steps_per_epoch)
        return self._loader(rows, ShuffledSampler(rows, 1, 0, shuffle=False))

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run must share with the run that wrote the checkpoint."""
        return {**super().state_dict(), "steps_per_epoch": self.steps_per_epoch}

    def _eval_loader(self, data: tuple[Tensor, ...] | None) -> StatefulDataLoader | list[StatefulDataLoader]:
        if data is None:
            return []
        rows = TensorRows(data)
        return self._loader(rows, ShuffledSampler(rows, 1, 0, shuffle=False))  # the same matrix on every rank


class _Repeated(TensorRows[Any]):
    """One batch, ``times`` times, without copying it."""

    def __init__(self, batch: tuple[Tensor, ...], times: int) -> None:
        super().__init__(batch)
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        return self.data
