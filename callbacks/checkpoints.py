"""Checkpoints that survive a kill: the run's true last state, and files that are whole or not there."""

import os
import shutil
from pathlib import Path
from textwrap import shorten
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint file beside its target, and put it in place only when it is whole and on the disk.

    Give it to the Trainer as ``plugins=AtomicCheckpointIO()``. A kill, a power cut or a full disk while a checkpoint is
    written leaves the previous file as it was. (Lightning writes to ``TMPDIR`` and moves the file, which copies it over
    the old one when the two lie on different file systems.) A file that cannot be read is refused in one line with its
    name. Remote paths (``s3://...``) are written as Lightning writes them; sharded checkpoints, which are folders, do
    not pass here: see :class:`LastCheckpoint`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file and put it in place."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        try:
            torch.save(checkpoint, part)
            replace(part, target)
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Read the file.

        Raises:
            ValueError: it is no checkpoint of a Trainer, or damaged.
        """
        try:
            checkpoint = super().load_checkpoint(path, *args, **options)
        except FileNotFoundError:
            raise
        except Exception as error:
            reason = str(error).rpartition("WeightsUnpickler error:")[2]  # what comes before is advice
            if os.path.isfile(path) and not is_zipfile(path):
                reason = "it is cut short, or another kind of file" if os.path.getsize(path) else "it is empty"
            raise ValueError(f"{path} is not a checkpoint, or damaged: {shorten(reason, 200)}") from error
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ValueError(f"{path} is not a checkpoint of a Trainer: it holds no state_dict")
        return checkpoint


class LastCheckpoint(Checkpoint):
    """Keep the run's last state in ``last.ckpt``, to resume from; ``ModelCheckpoint(monitor=...)`` keeps the best.

    (``ModelCheckpoint(monitor=..., save_last=True)`` writes ``last.ckpt`` only when it writes a best one: the run would
    go back to its best epoch. Leave ``save_last`` out.) The file lies beside the best checkpoint, or in
    ``<log folder>/checkpoints``. Until a new one is whole the previous one stays, also where checkpoints are folders of
    shards; ``last.ckpt`` is then a link to the folder. It is written at the end of epochs, of the last in any case.

    Args:
        every_n_epochs: write at the end of every n-th epoch, >= 1.
        every_n_steps: write also within epochs, after every n optimizer steps, >= 1; None: not within epochs. Choose it
            so that what a kill may lose is worth less than the time that writing takes.
        dirpath: another folder.

    Raises:
        ValueError: an argument out of range; when training starts, a ``ModelCheckpoint`` that has ``save_last``.
    """

    best_model_path = ""  # Lightning asks the first checkpoint callback for it

    def __init__(
        self, every_n_epochs: int = 1, every_n_steps: int | None = None, dirpath: str | Path | None = None
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self._saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here, and refuse another writer of ``last.ckpt``."""
        if any(isinstance(c, ModelCheckpoint) and c.save_last for c in trainer.checkpoint_callbacks):
            raise ValueError("save_last must be left out of ModelCheckpoint: LastCheckpoint writes last.ckpt")
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save within the epoch when it is time."""
        n = self.every_n_steps
        if n is not None and trainer.global_step // n > self._saved_step // n:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the epoch's end when it is time."""
        epochs = trainer.current_epoch + 1
        over = trainer.should_stop or epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if over or epochs % self.every_n_epochs == 0:
            self._save(trainer)

    def _save(self, trainer: Any) -> None:
        self._saved_step = trainer.global_step
        if trainer.fast_dev_run:
            return
        beside = (c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
        log_dir = trainer.log_dir or trainer.default_root_dir
        folder = str(self.dirpath or next(beside, None) or os.path.join(log_dir, "checkpoints"))
        target = os.path.join(folder, "last.ckpt")
        if not _is_local_file_protocol(folder):
            trainer.save_checkpoint(target, weights_only=False)
            return
        part = Path(folder, ".last.ckpt.part")
        if trainer.is_global_zero and part.is_dir():
            shutil.rmtree(part)  # of a save that was killed
        trainer.save_checkpoint(part, weights_only=False)
        if trainer.is_global_zero:
            replace(part, Path(target))
        trainer.strategy.barrier("LastCheckpoint")


def replace(part: Path, target: Path) -> None:
    """Put a file or a folder in the place of ``target`` at one blow, once it is on the disk.

    A folder cannot take another's place at one blow, a link can: it is renamed, and ``target`` becomes a link to it.
    """
    previous = target.resolve() if target.exists() else None
    if part.is_dir():
        for path in part.rglob("*"):
            _sync(path)
        names = (target.with_name(f"{target.stem}-{number}{target.suffix}") for number in range(2))
        folder = next(name for name in names if name.resolve() != previous)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        link = target.with_name(f".{target.name}.link")
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        if target.is_dir() and not target.is_symlink():  # written by Lightning itself
            target.rename(target.with_name(f".{target.name}.old"))
            previous = target.with_name(f".{target.name}.old")
        part = link
    else:
        _sync(part)
    os.replace(part, target)
    _sync(target.parent)
    if previous is not None and previous.is_dir() and previous != target.resolve():
        shutil.rmtree(previous)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
