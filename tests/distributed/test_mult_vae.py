"""Mult-DAE on two real gloo processes equal one process on the joint batch: weights and metrics."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.cli import run_new_process
from tests.standins.interaction_files import write_u_data

TRAIN_USERS, HELDOUT = 32, 15  # 15 users do not divide by 2: nobody may be counted twice


def run(
    folder: Path, name: str, model: dict[str, Any], devices: int, epochs: int
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Train and test; the weights, and the logged rows."""
    data = {
        "version": "100k",
        "data_dir": ".",
        "num_heldout_users": HELDOUT,
        "batch_size": 16 // devices,
        "eval_batch_size": 4,
    }
    config = {
        "seed_everything": 1,
        "model": model,
        "data": {"class_path": "lit_methods.datamodules.MovieLensDataModule", "init_args": data},
        "trainer": {
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "precision": "64-true",
            "max_epochs": epochs,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": ".", "name": name, "version": "run"},
            },
            "callbacks": [
                {"class_path": "lit_methods.callbacks.ExactResume"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": name, "filename": "last"},
                },
                {"class_path": "lit_methods.callbacks.ResultTable"},
            ],
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    run_new_process(folder, "fit", "--config", str(path), ranks=devices)
    with (folder / name / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return torch.load(folder / name / "last.ckpt", weights_only=True)["state_dict"], rows


def values(rows: list[dict[str, str]], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key)]


def test_two_ranks_equal_one_process(tmp_path) -> None:
    """Without dropout, since ranks draw different masks."""
    write_u_data(tmp_path, users=TRAIN_USERS + 2 * HELDOUT)
    arguments = {"hidden_dims": [7], "latent_dim": 4, "dropout": 0.0, "recall_at": [3, 5], "ndcg_at": [10]}
    model = {"class_path": "lit_methods.vi.MultDAE", "init_args": arguments}
    (weights, rows), (expected, expected_rows) = (run(tmp_path, f"on{n}", model, n, 3) for n in (2, 1))
    assert list(weights) == list(expected)
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-9, atol=1e-10)
    for stage in ("val", "test"):
        for metric in ("recall@3", "recall@5", "ndcg@10"):
            ours, theirs = (values(r, f"{stage}/{metric}") for r in (rows, expected_rows))
            assert len(ours) == len(theirs) == (3 if stage == "val" else 1)
            assert ours == pytest.approx(theirs, rel=1e-9)
    errors = [values(r, "test/ndcg@10/se") for r in (rows, expected_rows)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    assert errors[0][0] > 0
