"""The table of both algorithms."""

import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.callbacks import TransportTable
from lit_methods.datamodules import DigitsDataModule
from lit_methods.nets import MLP
from lit_methods.supervised import SupervisedModule


def test_solves_every_problem_with_every_solver(tmp_path, capsys):
    table = TransportTable(eta=200.0, assignment_size=30, image_size=8, max_sweeps=20_000)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        callbacks=[table],
    )
    trainer.fit(SupervisedModule(MLP(64, [], 10), num_classes=10), DigitsDataModule())
    assert [(row["problem"], row["solver"]) for row in table.rows] == [
        (problem, solver)
        for problem in ("assignment, n=30", "images, L2 cost", "images, L1 cost")
        for solver in ("SNS", "SNS, eps_scaling=0", "Sinkhorn")
    ]
    printed = capsys.readouterr().out
    assert "images, L1 cost" in printed
    for k in range(0, 9, 3):
        newton, _, sinkhorn = table.rows[k : k + 3]
        assert float(newton["error"]) <= 1e-10
        assert newton["value"] == pytest.approx(sinkhorn["value"], abs=1e-8)
        assert newton["steps"] + newton["sweeps"] < sinkhorn["sweeps"]
        assert sinkhorn["steps"] == 0
    restored = TransportTable()
    restored.load_state_dict(table.state_dict())
    assert restored.rows == table.rows
    torch.testing.assert_close(restored.images, table.images)
