"""What every LightningModule promises, together with a datamodule."""

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from tests.cli import run_here, run_new_process
from tests.contract.cases.kinds import ModuleCase
from tests.contract.compare import assert_same
from tests.contract.pieces import real_arguments
from tests.contract.resume import compare_averaged_runs, compare_resumed_runs

STEPS = 3
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 100,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def check_runs_through_the_cli(case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(case, folder, fast_dev_run=2)
    for command in ("fit", "validate", "test", "predict"):
        run_here(monkeypatch, folder, command, "--config", config)


def check_resumes_bit_exactly_in_new_processes(case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case.prepare(folder)
    compare_resumed_runs(folder, _two_short_epochs(case))


def check_resumes_beside_averages_of_weights(case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case.prepare(folder)
    compare_averaged_runs(folder, _two_short_epochs(case))


def check_checkpoint_rebuilds_the_module(case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(case, folder, max_steps=STEPS, callbacks=resume_callbacks("run"))
    run_here(monkeypatch, folder, "fit", "--config", config)
    path = folder / "run" / f"step={STEPS}.ckpt"
    saved = torch.load(path, weights_only=True)
    rebuilt = type(case.make()).load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert_same(dict(rebuilt.state_dict()), dict(saved["state_dict"]), "rebuilt module")


def check_refuses_numbers_that_are_not_finite(case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case.prepare(folder)
    monkeypatch.chdir(folder)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    for name, many in real_arguments(type(case.make())).items():
        for bad in (math.inf, -math.inf, math.nan):
            if bad == math.inf and name in case.may_be_infinite:
                continue
            config = copy.deepcopy(case.config["model"])
            config.setdefault("init_args", {})[name] = [bad, 0.5] if many else bad
            with pytest.raises(ValueError, match=name):
                parser.instantiate_classes(parser.parse_object({"model": config}))


def check_loads_wider_weights_without_rounding(case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = case.make().double().state_dict()
    module = case.make()
    module.load_state_dict(saved)
    assert_same(dict(module.state_dict()), dict(saved), "loaded module")


def check_directly_built_module_saves_plain_data(
    case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(**QUIET, fast_dev_run=True)
    trainer.strategy.connect(case.make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.save_checkpoint(folder / "direct.ckpt")
    torch.load(folder / "direct.ckpt", weights_only=True)


def check_ranks_stay_identical_under_ddp(case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = {"class_path": "tests.contract.probes.RanksAgree"}
    config = write_config(case, folder, max_steps=STEPS, strategy="ddp", devices=2, callbacks=[probe])
    run_new_process(folder, "fit", "--config", config, ranks=2)


def check_runs_finite_in_mixed_bfloat16(case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = {"class_path": "tests.contract.probes.ParametersFinite"}
    config = write_config(case, folder, max_steps=STEPS, precision="bf16-mixed", callbacks=[probe])
    run_here(monkeypatch, folder, "fit", "--config", config)


def check_logs_without_warnings(case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(case, folder, max_steps=STEPS, limit_val_batches=1, val_check_interval=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_here(monkeypatch, folder, "fit", "--config", config)
    about_logging = [str(w.message) for w in caught if "log(" in str(w.message) or "sync_dist" in str(w.message)]
    assert not about_logging, about_logging


def check_bad_arguments_raise_by_name(case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for build, message in case.bad:
        with pytest.raises(ValueError, match=message):
            build()


def check_compiles(case: ModuleCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` captures ``forward`` without graph breaks and changes nothing."""
    module = case.make().eval()
    inputs = case.forward_inputs()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), module(*inputs))


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def write_config(case: ModuleCase, folder: Path, **trainer: object) -> str:
    """Write the case's data, and its config with trainer settings for a tiny run; returns the config's path."""
    path = folder / "config.yaml"
    if not path.exists():
        case.prepare(folder)
    path.write_text(
        yaml.safe_dump({"seed_everything": 1, **case.config, "trainer": {**QUIET, **case.trainer, **trainer}})
    )
    return str(path)


def _two_short_epochs(case: ModuleCase) -> dict[str, object]:
    callbacks = [{"class_path": f"lit_methods.callbacks.{name}"} for name in ("ExactResume", "LastCheckpoint")]
    tiny = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1, "val_check_interval": 2}
    return {"seed_everything": 1, **case.config, "trainer": {**QUIET, **tiny, **case.trainer, "callbacks": callbacks}}


def resume_callbacks(run: str) -> list[dict[str, object]]:
    """ExactResume, and a checkpoint every ``STEPS`` steps in the folder ``run``."""
    checkpoint = {"dirpath": run, "filename": "{step}", "every_n_train_steps": STEPS, "save_top_k": -1}
    return [
        {"class_path": "lit_methods.callbacks.ExactResume"},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
    ]
