"""Every module and callback, and a small recipe of every method, on a GPU. Skipped without one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from tests.cli import run_here
from tests.contract import callback_checks, module_checks
from tests.contract.cases import CALLBACKS, MODULES, RECIPES
from tests.contract.pieces import ROOT
from tests.gpu.device import DEVICE, ON_GPU

pytestmark = ON_GPU

CHECKS: list[Callable[..., None]] = [
    module_checks.check_runs_through_the_cli,
    module_checks.check_resumes_bit_exactly_in_new_processes,
    module_checks.check_runs_finite_in_mixed_bfloat16,
]
FIRST_RECIPES = {name.partition("/")[0]: name for name in sorted(RECIPES, reverse=True)}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("piece", MODULES, ids=lambda piece: piece.rpartition(".")[2])
def test_module(piece: str, check: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MODULES[piece]
    if reason := case.not_applicable.get(check.__name__):
        pytest.skip(reason)
    check(replace(case, trainer={**case.trainer, "accelerator": DEVICE}), tmp_path, monkeypatch)


@pytest.mark.parametrize("piece", CALLBACKS, ids=lambda piece: piece.rpartition(".")[2])
def test_callback(piece: str, tmp_path: Path) -> None:
    case = CALLBACKS[piece]
    check = callback_checks.check_state_survives_a_checkpoint
    if check.__name__ in case.not_applicable:
        check = callback_checks.check_attaches_to_an_unrelated_module
    if reason := case.not_applicable.get(check.__name__):
        pytest.skip(reason)
    check(replace(case, accelerator=DEVICE), tmp_path)


@pytest.mark.parametrize("piece", MODULES, ids=lambda piece: piece.rpartition(".")[2])
def test_forward_agrees_with_the_cpu(piece: str) -> None:
    case = MODULES[piece]
    if reason := case.not_applicable.get("check_compiles"):
        pytest.skip(reason)
    torch.manual_seed(0)
    module = case.make().eval().double()
    inputs = apply_to_collection(case.forward_inputs(), Tensor, lambda x: x.double() if x.is_floating_point() else x)
    with torch.no_grad():
        here = module(*inputs)
        there = module.to(DEVICE)(*apply_to_collection(inputs, Tensor, lambda x: x.to(DEVICE)))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", FIRST_RECIPES.values(), ids=FIRST_RECIPES)
def test_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = RECIPES[name]
    case.prepare(tmp_path)
    config = str(ROOT / "recipes" / f"{name}.yaml")
    run_here(monkeypatch, tmp_path, "fit", "--config", config, *case.overrides, f"--trainer.accelerator={DEVICE}")
