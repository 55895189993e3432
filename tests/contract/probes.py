"""Callbacks that a check adds to a run."""

import hashlib

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer


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
