"""Checkpoints that are folders of shards (FSDP2): the last state is whole at any time, and resumes."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lit_methods.callbacks import AtomicCheckpointIO, ExactResume, LastCheckpoint
from tests.contract.callback_checks import UnrelatedModule
from tests.distributed.launch import run_ranks
from tests.new_processes import act_as_torchrun


class Sharded(UnrelatedModule):
    def configure_model(self) -> None:
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


class Dies(LastCheckpoint):
    """Fails while it writes, at this step."""

    at = 0

    def _save(self, trainer: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(Path(self.dirpath, ".last.ckpt.part"))  # type: ignore[arg-type]
            raise KeyboardInterrupt
        super()._save(trainer)


def _fit(rank: int, folder: Path) -> list[Any]:
    act_as_torchrun(rank, 2)

    def run(callback: LastCheckpoint, ckpt_path: Path | None = None, epochs: int = 3) -> list[torch.Tensor]:
        trainer = Trainer(
            accelerator="cpu",
            strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            devices=2,
            max_epochs=epochs,
            limit_val_batches=0,
            use_distributed_sampler=False,
            callbacks=[ExactResume(), callback],
            plugins=[AtomicCheckpointIO()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Sharded()
        with contextlib.suppress(SystemExit):
            trainer.fit(module, ckpt_path=ckpt_path)
        return [p.full_tensor().detach() for p in module.parameters()]  # type: ignore[attr-defined]

    torch.manual_seed(0)
    whole = run(LastCheckpoint(dirpath=folder / "whole"))
    torch.manual_seed(0)
    dies = Dies(dirpath=folder / "killed")
    dies.at = 6
    run(dies)
    left = sorted(os.listdir(folder / "killed"))
    resumed = run(LastCheckpoint(dirpath=folder / "killed"), folder / "killed" / "last.ckpt")
    return [whole, resumed, left, sorted(os.listdir(folder / "killed"))]


def test_a_save_of_shards_that_dies_leaves_the_previous_one(tmp_path: Path) -> None:
    for whole, resumed, left, after in run_ranks(_fit, 2, tmp_path):
        assert left == [".last.ckpt.part", "last-0.ckpt", "last.ckpt"]
        assert after == ["last-1.ckpt", "last.ckpt"] or after == ["last-0.ckpt", "last.ckpt"]
        for p, q in zip(resumed, whole, strict=True):
            assert torch.equal(p, q)
