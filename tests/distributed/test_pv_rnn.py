"""Adaptive vectors that stay on their rank: training, checkpoint and resume equal one process."""

from pathlib import Path
from typing import Any

import torch
import yaml

from tests.cli import run_new_process


def run(folder: Path, name: str, devices: int, epochs: int, *options: str) -> dict[str, Any]:
    """Train without noise on the latents; the last checkpoint."""
    network = {
        "output_size": 1, "hidden_sizes": [5], "latent_sizes": [1], "time_constants": [2.0],
        "log_sigma_bounds": [-41.0, -40.0],
    }  # fmt: skip
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": "lit_methods.vi.PVRNNModule",
            "init_args": {
                "network": {"class_path": "lit_methods.vi.PVRNN", "init_args": network},
                "meta_prior": 0.0,
                "shard_adaptive": devices > 1,
            },
        },
        "data": {
            "class_path": "lit_methods.datamodules.SymbolicMarkovDataModule",
            "init_args": {"seq_len": 6, "train_size": 7, "batch_size": 7, "pin_to_ranks": devices > 1},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "precision": "64-true",
            "max_epochs": epochs,
            "use_distributed_sampler": False,
            "enable_progress_bar": False,
            "logger": False,
            "callbacks": [
                {"class_path": "lit_methods.callbacks.ExactResume"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": name, "filename": f"epochs{epochs}"},
                },
            ],
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    run_new_process(folder, "fit", "--config", str(path), *options, ranks=devices)
    return torch.load(folder / name / f"epochs{epochs}.ckpt", weights_only=True)


def test_sharded_adaptive_vectors_equal_one_process_and_resume(tmp_path: Path) -> None:
    one = run(tmp_path, "one", 1, 4)
    run(tmp_path, "two", 2, 2)
    two = run(tmp_path, "two", 2, 4, "--ckpt_path=two/epochs2.ckpt")
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        if not name.startswith("errors."):
            torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-7, atol=1e-10, msg=name)
    first, second = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, two))
    assert len(first) == len(second) > 3
    for i, state in first.items():
        for name, value in state.items():
            torch.testing.assert_close(second[i][name], value, rtol=1e-7, atol=1e-12)
    assert (first[0]["exp_avg"] != 0).flatten(1).any(1).all()  # the adaptive vectors come first: all seven were trained
