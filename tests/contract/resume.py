"""One uninterrupted run leaves checkpoints at all places, a second one is killed, and runs resume from each of them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.cli import run_new_process
from tests.contract.compare import assert_same

PROBES = "tests.contract.probes."


def check_resumes(folder: Path, config: dict[str, Any], overrides: list[str] | None = None) -> None:
    """Compare runs of a config that resume with one that does not stop: weights, optimizers, generators and the log.

    Args:
        folder: where the runs work; the data of the config is there.
        config: what ``fit`` gets; ExactResume and LastCheckpoint are among its callbacks.
        overrides: command line options.
    """

    def command(run: str, **probe: Any) -> list[str]:
        trainer = dict(config["trainer"])
        trainer["callbacks"] = [
            *({"class_path": PROBES + "FirstEpochIsBest"}, *trainer["callbacks"]),
            {"class_path": PROBES + "SaveEverywhere", "init_args": {"dirpath": run, **probe}},
        ]
        log = {"save_dir": run, "name": "", "version": ""}
        trainer["logger"] = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": log}
        trainer |= {"log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False}
        (folder / f"{run}.yaml").write_text(yaml.safe_dump({**config, "trainer": trainer}))
        return ["fit", "--config", f"{run}.yaml", *(overrides or [])]

    run_new_process(folder, command("whole"), command("killed", kill_in_epoch=1), killed=True)
    places = {"killed": folder / "killed" / "checkpoints" / "last.ckpt"}
    for kind in ("step", "validation", "epoch"):
        found = sorted((folder / "whole").glob(f"{kind}=*.ckpt"))
        if found[:-1]:
            places[kind] = found[0]
    run_new_process(folder, *([*command(f"from_{n}"), "--ckpt_path", str(path)] for n, path in places.items()))
    for name, path in places.items():
        assert_same_run(folder / f"from_{name}", folder / "whole", torch.load(path, weights_only=True), name)


def assert_same_run(resumed: Path, whole: Path, saved: dict[str, Any], place: str) -> None:
    end = max(whole.glob("epoch=*.ckpt"))
    ends = [torch.load(run / end.name, weights_only=True) for run in (resumed, whole)]
    assert ends[1]["loops"]["fit_loop"]["epoch_progress"] != saved["loops"]["fit_loop"]["epoch_progress"], "at its end"
    for part in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(*(found[part] for found in ends), f"from {place}: {part}")
    assert_same(*(found["callbacks"]["ExactResume"] for found in ends), f"from {place}: ExactResume")
    step = saved["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    logs = [[line for line in read_log(run) if line[0] > step] for run in (resumed, whole)]
    assert logs[0] == logs[1], f"from {place}: the logs differ after step {step}"
