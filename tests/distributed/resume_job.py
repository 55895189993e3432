"""A small training run that can kill itself; ``test_kill_resume.py`` starts it, one process per rank."""

import argparse
import hashlib
import json
import os
import random
import signal
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lit_methods.callbacks import ExactResume
from lit_methods.datamodules import DigitsDataModule

EPOCHS = 3
STEPS_PER_EPOCH = 10
SAVE_EVERY = 5


class NoisyClassifier(pl.LightningModule):
    """Dropout, random augmentation, momentum, and draws from every global generator; writes down each step."""

    def __init__(self, record: Path, kill_at: int | None) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))
        self.record = record
        self.kill_at = kill_at

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.seen = hashlib.sha256(batch.x.numpy().tobytes() + batch.y.numpy().tobytes()).hexdigest()
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        noise = 0.1 * torch.randn_like(batch.x) if self.trainer.training else 0.0
        return batch._replace(x=batch.x + noise)

    def training_step(self, batch, batch_idx):
        if self.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        scale = 1 + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002
        loss = scale * nn.functional.cross_entropy(self.network(batch.x), batch.y)
        self.log("train/loss", loss)
        step = {"step": self.global_step, "epoch": self.current_epoch, "data": self.seen, "loss": loss.item().hex()}
        with self.record.open("a") as file:
            file.write(json.dumps(step) + "\n")
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.network(batch.x), batch.y), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--kill_at", type=int)
    parser.add_argument("--resume", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    pl.seed_everything(1 if args.resume is None else 2, verbose=False)
    if rank:
        torch.manual_seed(100 + rank)  # ranks draw differently, as they would with per-rank augmentation
    data = DigitsDataModule(batch_size=32 // args.ranks, num_workers=args.workers, val_size=77, test_size=1400, seed=5)
    checkpoint = ModelCheckpoint(args.folder, every_n_train_steps=SAVE_EVERY, save_last=True)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        strategy="ddp" if args.ranks > 1 else "auto",
        devices=args.ranks,
        use_distributed_sampler=False,
        callbacks=[ExactResume(), checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = NoisyClassifier(args.folder / f"rank{rank}.jsonl", args.kill_at)
    trainer.fit(module, datamodule=data, ckpt_path=args.resume)
    trainer.save_checkpoint(args.folder / "final.ckpt")


if __name__ == "__main__":
    main()
