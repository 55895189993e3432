"""Ranks with unequally many batches end in an error, not in a wait without end."""

import pytest
import torch
from lightning.pytorch import Trainer
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.callbacks import ExactResume
from tests.contract.callback_checks import UnrelatedModule
from tests.distributed.launch import run_ranks
from tests.new_processes import act_as_torchrun


class Unequal(UnrelatedModule):
    """Rank 0 has three batches, rank 1 has two."""

    def train_dataloader(self) -> StatefulDataLoader:
        rows = [(torch.ones(4), 1)] * (3 - self.global_rank)
        return StatefulDataLoader(rows, batch_size=1)


def _fit(rank: int, limit: int | None) -> str:
    act_as_torchrun(rank, 2)
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=1,
        limit_train_batches=limit,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[ExactResume()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(Unequal())
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("limit", [None, 2])
def test_unequal_ranks(limit: int | None) -> None:
    for message in run_ranks(_fit, 2, limit):
        if limit is None:
            assert "must have equally many batches on every rank, got [3, 2]" in message
            assert "Trainer(limit_train_batches=2)" in message
        else:
            assert message == "trained"
