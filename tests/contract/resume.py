"""One run leaves checkpoints at all places, another is killed, and further ones resume from each place."""

import csv
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_methods.cli import LitMethodsCLI
from tests.contract.compare import assert_same
from tests.new_processes import new_processes

PROBES = "tests.contract.probes."
AVERAGES: dict[str, dict[str, Any]] = {
    "WeightAveraging": {},
    "EMAWeightAveraging": {"decay": 0.9},
    "StochasticWeightAveraging": {"swa_lrs": 0.01, "swa_epoch_start": 1},
}
REFUSED = 3
CLOCK = re.compile(r"/time/|_per_s/")  # metrics that no two runs share


def compare_resumed_runs(folder: Path, config: dict[str, Any], overrides: list[str] | None = None) -> None:
    """Compare runs that resume with one that does not stop: weights, optimizers, generators, loaders and the log.

    Args:
        folder: where the runs work; the data that the config reads is there.
        config: what ``fit`` gets, of two epochs at least; ExactResume and LastCheckpoint are among its callbacks.
        overrides: command line options.
    """
    _do_in_processes(_Kills, folder, config, overrides)
    for place, path in checkpoints(folder).items():
        _assert_same_run(folder / f"from_{place}", folder / "whole", path)


def compare_averaged_runs(folder: Path, config: dict[str, Any]) -> None:
    """Resume from the end of the first epoch beside each of Lightning's callbacks that average weights."""
    averages = [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": a} for name, a in AVERAGES.items()]
    trainer = {**config["trainer"], "callbacks": [*config["trainer"]["callbacks"], *averages]}
    _do_in_processes(_Averages, folder, {**config, "trainer": trainer})
    for resumed in folder.glob("*_resumed"):
        whole = folder / resumed.name.removesuffix("_resumed")
        _assert_same_run(resumed, whole, min(whole.glob("epoch=*.ckpt")))


def _do_in_processes(
    runs: type["_Runs"], folder: Path, config: dict[str, Any], overrides: list[str] | None = None
) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": ".", "name": ""}}
    trainer = {**config["trainer"], "log_every_n_steps": 1, "enable_progress_bar": False, "logger": logger}
    trainer["callbacks"] = [
        {"class_path": PROBES + "FirstEpochIsBest"},
        *trainer["callbacks"],
        {"class_path": PROBES + "SaveEverywhere", "init_args": {"dirpath": "."}},
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "trainer": trainer}))
    try:
        new_processes(_do_runs, 1, runs, folder, ["fit", "--config", "config.yaml", *(overrides or [])])
    except Exception as error:
        raise AssertionError((folder / "output.txt").read_text()) from error


def checkpoints(folder: Path) -> dict[str, Path]:
    """Those to resume from, by the place where they were written."""
    places = {"last": folder / "killed" / "checkpoints" / "last.ckpt"}
    for place in ("step", "validation", "epoch"):
        if found := sorted((folder / "whole").glob(f"{place}=*.ckpt")):
            places[place] = found[0]
    return places


def _do_runs(_: int, runs: type["_Runs"], folder: Path, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["lit-methods", *arguments]
    runs()


class _Runs(LitMethodsCLI):
    """Parses once, then makes each run in a process of its own; parsing takes longer than a tiny run."""

    parsed = False

    def instantiate_classes(self) -> None:
        if self.parsed:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        self.parsed, self.save_config_callback = True, None
        self.do_runs()

    def do_runs(self) -> None:
        raise NotImplementedError

    def fork(
        self, run: str, kill_in_epoch: int | None = None, ckpt_path: Path | None = None, average: str | None = None
    ) -> int:
        """Make one run; returns the exit status, or the signal that killed it."""
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1]
        try:
            config = self.config.fit
            config.ckpt_path = ckpt_path and str(ckpt_path)
            config.trainer.logger.init_args.version = run
            config.trainer.callbacks = [
                c
                for c in config.trainer.callbacks
                if (name := c.class_path.rpartition(".")[2]) not in AVERAGES or name == average
            ]
            config.trainer.callbacks[-1].init_args.dirpath = run
            config.trainer.callbacks[-1].init_args.kill_in_epoch = kill_in_epoch
            self._set_seed()
            self.instantiate_classes()
            super()._run_subcommand("fit")
            os._exit(0)
        except BaseException as error:
            traceback.print_exc()
            os._exit(REFUSED if isinstance(error, MisconfigurationException) else 1)


class _Kills(_Runs):
    def do_runs(self) -> None:
        assert self.fork("whole") == 0
        assert self.fork("killed", kill_in_epoch=1) == signal.SIGKILL
        for place, path in checkpoints(Path()).items():
            assert self.fork(f"from_{place}", ckpt_path=path) == 0


class _Averages(_Runs):
    def do_runs(self) -> None:
        for name in AVERAGES:
            status = os.waitstatus_to_exitcode(self.fork(name, average=name))
            if name == "StochasticWeightAveraging" and status == REFUSED:
                continue  # Lightning wants one optimizer
            assert status == 0
            assert self.fork(f"{name}_resumed", ckpt_path=min(Path(name).glob("epoch=*.ckpt")), average=name) == 0


def _assert_same_run(resumed: Path, whole: Path, checkpoint: Path) -> None:
    end = max(whole.glob("epoch=*.ckpt"))
    mine, theirs = (torch.load(run / end.name, weights_only=True) for run in (resumed, whole))
    for part in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(mine[part], theirs[part], f"from {checkpoint}: {part}")
    states = [found["callbacks"]["ExactResume"] for found in (mine, theirs)]
    for rank in (rank for state in states for rank in state["ranks"]):
        rank["callback_metrics"] = {k: v for k, v in rank["callback_metrics"].items() if not CLOCK.search(k)}
    assert_same(*states, f"from {checkpoint}: ExactResume")
    loops = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
    step = loops["epoch_loop.state_dict"]["_batches_that_stepped"]
    logged, expected = ([line for line in _read_log(run) if line[0] > step] for run in (resumed, whole))
    assert logged == expected, f"from {checkpoint}: the logs after step {step} differ"


def _read_log(run: Path) -> list[tuple[int, str, str]]:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        (int(row["step"]), name, value)
        for row in rows
        for name, value in row.items()
        if value and name != "step" and not CLOCK.search(name)
    ]
