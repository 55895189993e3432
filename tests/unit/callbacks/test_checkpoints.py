"""Files that survive kills and full disks, and the true last state beside the best one."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_methods.callbacks import AtomicCheckpointIO, LastCheckpoint
from lit_methods.callbacks.checkpoints import replace
from tests.contract.callback_checks import UnrelatedModule


class Fails:
    """Cannot be saved, as on a full disk; or kills the process that saves it."""

    def __init__(self, kill: bool = False) -> None:
        self.kill = kill

    def __reduce__(self) -> Any:
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("no space left on device")


def save(checkpoint: dict[str, Any], path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)


def test_a_failed_save_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    save({"state_dict": {}, "step": 1}, path)
    with pytest.raises(OSError, match="no space"):
        save({"state_dict": torch.ones(1000), "step": Fails()}, path)
    assert AtomicCheckpointIO().load_checkpoint(path)["step"] == 1
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_kill_within_a_save_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save({"state_dict": {}, "step": 1}, path)
    job = multiprocessing.get_context("fork").Process(
        target=save, args=({"state_dict": torch.ones(1000), "step": Fails(kill=True)}, path)
    )
    job.start()
    job.join()
    assert job.exitcode == -signal.SIGKILL
    assert AtomicCheckpointIO().load_checkpoint(path)["step"] == 1
    save({"state_dict": {}, "step": 2}, path)
    assert AtomicCheckpointIO().load_checkpoint(path)["step"] == 2
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"hello, this is text", "it is cut short, or another kind of file"),
        ("half", "it is cut short, or another kind of file"),
        ([1, 2], "holds no state_dict"),
        ({"weights": 1}, "holds no state_dict"),
        ({"state_dict": {}, "hyper_parameters": Path("x")}, "Unsupported global"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": torch.ones(1000)} if content == "half" else content, path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=reason) as caught:
        AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"nope\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "nope.ckpt")


def shards(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "meta.pt").write_text(content)
    return folder


@pytest.mark.parametrize("there_already", [False, True])
def test_folders_of_shards_take_each_others_place_by_a_link(tmp_path: Path, there_already: bool) -> None:
    part, last = tmp_path / ".last.ckpt.part", tmp_path / "last.ckpt"
    if there_already:
        shards(last, "written by Lightning")
    for content in ("1", "2", "3"):
        replace(shards(part, content), last)
        assert last.is_symlink()
        assert (last / "meta.pt").read_text() == content
        assert len(os.listdir(tmp_path)) == 2  # the link and the folder
    part.write_text("a file again")
    replace(part, last)
    assert last.read_text() == "a file again"
    assert os.listdir(tmp_path) == ["last.ckpt"]


class GetsWorse(UnrelatedModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))


def fit(folder: Path, *callbacks: Any, module: LightningModule | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **({"max_epochs": 3} | options),
    )
    trainer.fit(module or GetsWorse())
    return trainer


def test_last_is_the_last_and_best_the_best(tmp_path: Path) -> None:
    fit(tmp_path, LastCheckpoint(), ModelCheckpoint(tmp_path / "here", "best", monitor="val_loss"))
    best, last = (torch.load(tmp_path / "here" / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert best["epoch"] == 0
    assert last["epoch"] == 2
    assert last["global_step"] == 9
    assert sorted(os.listdir(tmp_path / "here")) == ["best.ckpt", "last.ckpt"]


class Saves(Callback):
    """Notes when a checkpoint is saved."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("arguments", "options", "steps"),
    [
        ({}, {}, [3, 6, 9]),
        ({"every_n_epochs": 2}, {}, [6, 9]),
        ({"every_n_epochs": 100, "every_n_steps": 2}, {}, [2, 4, 6, 8, 9]),
        ({"every_n_epochs": 100}, {"max_steps": 4, "max_epochs": -1}, [4]),
        ({"every_n_epochs": 100, "every_n_steps": 2}, {"accumulate_grad_batches": 3}, [2, 3]),
    ],
)
def test_when_it_is_written(tmp_path: Path, arguments: dict[str, Any], options: Any, steps: list[int]) -> None:
    saves = Saves()
    fit(tmp_path, LastCheckpoint(**arguments), saves, **options)
    assert saves.steps == steps
    assert os.listdir(tmp_path / "checkpoints") == ["last.ckpt"]


def test_two_writers_of_last_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_last must be left out"):
        fit(tmp_path, LastCheckpoint(), ModelCheckpoint(save_last=True))
