"""Callbacks that a check adds to a run."""

import hashlib
import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint


class RanksAgree(Callback):
    """Fail at the end of fit unless all ranks hold the same parameters to the last bit."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.world_size > 1, "RanksAgree needs several ranks"
        digest = hashlib.sha256()
        for p in pl_module.parameters():
            digest.update(p.detach().cpu().contiguous().view(-1).numpy().tobytes())
        digests = [None] * trainer.world_size
        dist.all_gather_object(digests, digest.hexdigest())
        assert len(set(digests)) == 1, f"ranks drifted apart: {digests}"


class ParametersFinite(Callback):
    """Fail at the end of fit unless all parameters are finite."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, p in pl_module.named_parameters():
            assert p.isfinite().all(), f"{name} is not finite"


class SaveEverywhere(Checkpoint):
    """Write a checkpoint after the first batch, after the first epoch's validations and after epochs; or die.

    Args:
        dirpath: folder of the checkpoints; their names end in the number of batches so far.
        kill_in_epoch: kill the process after the first batch of this epoch.
    """

    def __init__(self, dirpath: str, kill_in_epoch: int | None = None) -> None:
        self.dirpath = dirpath
        self.kill_in_epoch = kill_in_epoch

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == self.kill_in_epoch:
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.fit_loop.total_batch_idx == 0:
            self._save(trainer, "step")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training and trainer.current_epoch == 0:
            self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, "epoch")

    def _save(self, trainer: Trainer, place: str) -> None:
        if self.kill_in_epoch is None:
            batches = trainer.fit_loop.total_batch_idx + 1
            trainer.save_checkpoint(os.path.join(self.dirpath, f"{place}={batches:03}.ckpt"))


class FirstEpochIsBest(Callback):
    """What checkpoint callbacks monitor gets worse with every epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
                worse = -1.0 if callback.mode == "max" else 1.0
                trainer.callback_metrics[callback.monitor] = torch.tensor(worse * trainer.current_epoch)
