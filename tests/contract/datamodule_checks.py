"""What every LightningDataModule promises."""

import copy
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.contract.cases.kinds import DataModuleCase
from tests.contract.compare import assert_same


def check_batches_are_a_function_of_the_seed(case: DataModuleCase, folder: Path) -> None:
    first, again = (_batches(_ready(case, folder / name, seed=3)) for name in ("a", "b"))
    assert_same(again, first, "batches of the same seed")
    with pytest.raises(AssertionError):
        assert_same(_batches(_ready(case, folder / "c", seed=4)), first)


def check_epochs_differ(case: DataModuleCase, folder: Path) -> None:
    loader = _ready(case, folder, seed=3).train_dataloader()
    first = list(loader)
    loader.sampler.set_epoch(1)  # the Trainer does it
    with pytest.raises(AssertionError):
        assert_same(list(loader), first)


def check_loader_resumes_in_the_middle(case: DataModuleCase, folder: Path) -> None:
    loader = _ready(case, folder / "a", seed=3).train_dataloader()
    assert isinstance(loader, StatefulDataLoader)
    iterator = iter(loader)
    next(iterator)
    state = copy.deepcopy(loader.state_dict())
    resumed = _ready(case, folder / "b", seed=3).train_dataloader()
    resumed.load_state_dict(state)
    assert_same(list(resumed), list(iterator), "batches after resuming")
    assert_same(list(resumed), list(loader), "the epoch after")


def check_evaluation_order_is_fixed(case: DataModuleCase, folder: Path) -> None:
    data = _ready(case, folder, seed=3)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert_same(list(loader), list(loader), "evaluation batches")


def check_setup_only_reads_and_may_run_twice(case: DataModuleCase, folder: Path) -> None:
    data = _ready(case, folder, seed=3)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    expected = _batches(data)
    data.setup("fit")
    assert_same(_batches(data), expected, "batches after a second setup")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}, "setup wrote to the data folder"


def check_bad_arguments_raise_by_name(case: DataModuleCase, folder: Path) -> None:
    for arguments, message in case.bad:
        with pytest.raises(ValueError, match=message) as caught:
            case.make(folder, **arguments)
        name, value = next(iter(arguments.items()))
        assert name in str(caught.value), f"the message does not name {name}: {caught.value}"
        assert str(value) in str(caught.value), f"the message does not show the value {value!r}: {caught.value}"


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def _ready(case: DataModuleCase, folder: Path, **arguments: Any) -> LightningDataModule:
    folder.mkdir(exist_ok=True)
    data = case.make(folder, **arguments)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


def _batches(data: LightningDataModule) -> list[Any]:
    loader: Iterable[Any] = data.train_dataloader()
    return list(itertools.islice(loader, 4))
