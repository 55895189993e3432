"""A datamodule over tensors in memory: the loaders of all our small datasets, and of your own tensors.

Its loaders are what an exact resume needs (see :class:`lit_methods.callbacks.ExactResume`): ``torchdata``'s stateful
loader, a sample order that is a pure function of (seed, epoch, rank), and no random draw while a batch is fetched.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

Batch = TypeVar("Batch", bound=tuple[Tensor, ...])


def check_int(name: str, value: int, low: int, high: int | None = None) -> int:
    """Return ``value``, or raise the ``ValueError`` that names the argument, what it was and what it may be."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"Invalid {name}={value!r}: must be an integer {allowed}.")
    return value


def check_range(name: str, value: tuple[float, float]) -> tuple[float, float]:
    """Return ``value``, or raise the ``ValueError`` for what are not two rising finite numbers."""
    if len(value) != 2 or not float("-inf") < value[0] < value[1] < float("inf"):
        raise ValueError(f"Invalid {name}={value!r}: must be two rising finite numbers.")
    return value[0], value[1]


class TensorRows(Dataset[Batch], Generic[Batch]):
    """The rows of a NamedTuple of tensors, fetched a whole batch at a time by one indexing operation per tensor.

    Args:
        data: a batch contract of :mod:`lit_methods.batches` that holds all rows; its tensors share dimension 0.
        transform: applied to every fetched batch, e.g. to turn stored ``uint8`` into floats. It must draw nothing.
    """

    def __init__(self, data: Batch, transform: Callable[[Batch], Batch] | None = None) -> None:
        self.data = data
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch made of the rows ``indices``; ``DataLoader`` prefers this to one call per row."""
        rows = torch.as_tensor(indices)
        batch = self.data._make(tensor[rows] for tensor in self.data)  # type: ignore[attr-defined]
        return batch if self.transform is None else self.transform(batch)

    def __getitem__(self, index: int) -> Batch:
        """Return row ``index`` without the batch dimension."""
        batch = self.__getitems__([index])
        return batch._make(tensor[0] for tensor in batch)  # type: ignore[attr-defined]


class ShuffledSampler(DistributedSampler):
    """This rank's share of a permutation of the samples, a pure function of (seed, epoch, rank); knows its place.

    Every pass is a new epoch: the one that ``set_epoch`` names (Lightning calls it), else one after the last.
    ``torchdata``'s ``StatefulDistributedSampler`` saves its place without the epoch, so that loader processes, which
    fetch ahead before Lightning calls ``set_epoch``, resume in the order of epoch 0; and a place that was loaded at an
    epoch's very end leaks into the next epoch. Hence this one.
    """

    def __iter__(self) -> "_Pass":
        return _Pass(self)

    def order(self, epoch: int) -> list[int]:
        """Return this rank's samples of an epoch."""
        self.set_epoch(epoch)
        return list(super().__iter__())


class _Pass(Iterator[int]):
    """One pass of a :class:`ShuffledSampler`."""

    def __init__(self, sampler: ShuffledSampler) -> None:
        self.sampler = sampler
        self.epoch: int | None = None
        self.place = 0
        self.indices: list[int] = []

    def __next__(self) -> int:
        if self.epoch is None:
            self._begin(self.sampler.epoch)
        if self.place == len(self.indices):
            raise StopIteration
        self.place += 1
        return self.indices[self.place - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch if self.epoch is None else self.epoch, "place": self.place}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._begin(state_dict["epoch"])
        self.place = state_dict["place"]

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self.indices = self.sampler.order(epoch)
        self.sampler.set_epoch(epoch + 1)


class UnrepeatedSampler(DistributedSampler):
    """Every sample once, in order: rank ``r`` of ``n`` takes samples ``r, r + n, ...``.

    ``DistributedSampler`` itself repeats samples until all ranks have equally many, which biases an evaluation. It is
    the base class so that Lightning does not shard the shard.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def _as_it_is(batch: Batch) -> Batch:
    return batch


class TensorDataModule(pl.LightningDataModule):
    """Loaders over tensors that fit in memory, sharded over ranks and resumable to the bit.

    Subclasses set ``self.train_data``, ``self.val_data`` and ``self.test_data`` in :meth:`setup`; with tensors of your
    own, hand them to the constructor::

        data = TensorDataModule(train=SupervisedBatch(x, y), val=SupervisedBatch(x_val, y_val), batch_size=32)

    Prediction runs over the test data, in order. Evaluation visits every sample once on any number of ranks. Give the
    Trainer ``use_distributed_sampler=False``: these loaders already shard.

    Args:
        train: the training rows: a NamedTuple of tensors that share their first dimension. Batches have its type.
        val: the validation rows, or ``None`` for no validation.
        test: the test (and prediction) rows, or ``None``.
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0. In-memory data rarely gains from any.
        seed: seed of the sample order (and of a subclass's split), >= 0. Epoch ``e`` has its own order, the same
            whenever and wherever the run is repeated.
        transform: applied to every fetched batch; it must be vectorised and draw nothing (random augmentation belongs
            in ``on_after_batch_transfer``).

    Raises:
        ValueError: for an argument out of range, rows of unequal number, or a checkpoint written with other settings.
    """

    def __init__(
        self,
        train: tuple[Tensor, ...] | None = None,
        val: tuple[Tensor, ...] | None = None,
        test: tuple[Tensor, ...] | None = None,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.num_workers = check_int("num_workers", num_workers, 0)
        self.seed = check_int("seed", seed, 0)
        self.transform = transform
        for name, data in (("train", train), ("val", val), ("test", test)):
            _check_rows(name, data)
        self.train_data, self.val_data, self.test_data = train, val, test

    def train_dataloader(self) -> StatefulDataLoader:
        """Return a loader over this rank's share of the training rows, reshuffled every epoch."""
        if self.train_data is None:
            raise RuntimeError(f"{type(self).__name__} holds no training data: pass `train=`, or call `setup()` first.")
        rows = TensorRows(self.train_data, self.transform)
        sampler = ShuffledSampler(rows, *self._ranks(), shuffle=True, seed=self.seed)
        if self.trainer is not None:  # loader processes fetch ahead before the Trainer says which epoch it resumes
            epochs: Any = self.trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(epochs.processed)
        return self._loader(rows, sampler)

    def val_dataloader(self) -> StatefulDataLoader | list[StatefulDataLoader]:
        """Return a loader over this rank's share of the validation rows, or no loader when there are none."""
        return self._eval_loader(self.val_data)

    def test_dataloader(self) -> StatefulDataLoader | list[StatefulDataLoader]:
        """Return a loader over this rank's share of the test rows, or no loader when there are none."""
        return self._eval_loader(self.test_data)

    def predict_dataloader(self) -> StatefulDataLoader | list[StatefulDataLoader]:
        """Return the test loader: predictions are made for the test rows, in order."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run must share with the run that wrote the checkpoint."""
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "seed": self.seed,
            "train_size": 0 if self.train_data is None else len(self.train_data[0]),
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Refuse to resume training with settings that would change the order of the data."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        differing = {name: (old, self.state_dict()[name]) for name, old in state_dict.items()}
        changes = ", ".join(f"{name}={old} (now {new})" for name, (old, new) in differing.items() if old != new)
        if changes:
            raise ValueError(
                f"The checkpoint was written by a {type(self).__name__} with {changes}: its place in the data does not "
                "exist here. Resume with the old values, or start a new run from the weights alone "
                "(`load_from_checkpoint`, then `fit` without `ckpt_path`)."
            )

    def _eval_loader(self, data: tuple[Tensor, ...] | None) -> StatefulDataLoader | list[StatefulDataLoader]:
        if data is None or len(data[0]) == 0:
            return []
        rows = TensorRows(data, self.transform)
        return self._loader(rows, UnrepeatedSampler(rows, *self._ranks()))

    def _ranks(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(
        self, rows: TensorRows[Any], sampler: DistributedSampler[Any], batch_size: int | None = None
    ) -> StatefulDataLoader:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital'")  # torchdata 0.11 calls what torch 2.13 deprecates
            return StatefulDataLoader(
                rows,
                batch_size=self.batch_size if batch_size is None else batch_size,
                sampler=sampler,
                num_workers=self.num_workers,
                collate_fn=_as_it_is,
                pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
                generator=torch.Generator().manual_seed(self.seed),  # else each epoch draws from the global generator
            )


def _check_rows(name: str, data: tuple[Tensor, ...] | None) -> None:
    if data is None:
        return
    if not hasattr(data, "_make"):
        raise ValueError(
            f"Invalid {name}: must be a NamedTuple of tensors, e.g. lit_methods.batches.SupervisedBatch(x, y), "
            f"not a {type(data).__name__}."
        )
    sizes = [len(tensor) for tensor in data]
    if len(set(sizes)) != 1 or (name == "train" and sizes[0] == 0):
        raise ValueError(f"Invalid {name}: its tensors must hold equally many rows (>= 1 for train), got {sizes}.")
