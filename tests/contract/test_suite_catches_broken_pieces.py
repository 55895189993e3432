"""The contract suite is worth something: it rejects pieces that are broken on purpose."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.optim.foundation.finite import gradients_are_finite, warn_of_skipped_step
from lit_methods.optim.foundation.groups import check_lr, check_own_state
from tests.contract import callback_checks, datamodule_checks, module_checks, optimizer_checks, test_contract
from tests.contract.cases.kinds import CallbackCase, DataModuleCase, ModuleCase, OptimizerCase
from tests.contract.layers import forbidden_imports
from tests.contract.pieces import ROOT
from tests.recipes import recipe_checks


class SGD(torch.optim.Optimizer):
    """A correct optimizer; the broken ones below differ from it in one thing."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.check_rate(param_group.get("lr", self.defaults["lr"]))
        super().add_param_group(param_group)

    def check_rate(self, lr: Any) -> None:
        check_lr(lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.accepts([p for group in self.param_groups for p in group["params"]]):
            return loss
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group["lr"])
        return loss

    def accepts(self, params: list[Any]) -> bool:
        if any(p.grad is not None and p.grad.is_sparse for p in params):
            raise RuntimeError("sparse gradients are not supported")
        finite = gradients_are_finite(params)
        if not finite:
            warn_of_skipped_step(self)
        return finite

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_own_state(self, state_dict, set())
        super().load_state_dict(state_dict)

    def update(self, p: nn.Parameter, lr: float) -> None:
        if p.is_complex():
            raise RuntimeError("complex gradients are not supported")
        p.sub_(lr * p.grad)


class WrongResume(SGD):
    """Keeps its momentum outside ``state``."""

    def update(self, p: nn.Parameter, lr: float) -> None:
        self.__dict__.setdefault("velocity", {}).setdefault(p, torch.zeros_like(p)).mul_(0.9).add_(p.grad)
        p.sub_(lr * self.velocity[p])


class RanksDrift(SGD):
    """Adds noise from each rank's own generator."""

    def update(self, p: nn.Parameter, lr: float) -> None:
        p.sub_(lr * (p.grad + 1e-6 * torch.randn_like(p)))


class NoValidation(SGD):
    def check_rate(self, lr: Any) -> None:
        pass


class TakesInfiniteRates(SGD):
    def check_rate(self, lr: Any) -> None:
        if lr < 0:
            raise ValueError(f"lr must be >= 0, got {lr}")


class ReadsTheRateOnce(TakesInfiniteRates):
    """A schedule writes into a tensor, which this one does not look at again."""

    def update(self, p: nn.Parameter, lr: float) -> None:
        p.sub_(self.__dict__.setdefault("rate", float(lr)) * p.grad)


class SpoiledByNaN(SGD):
    def accepts(self, params: list[Any]) -> bool:
        return True


class SkipsInSilence(SGD):
    def accepts(self, params: list[Any]) -> bool:
        return gradients_are_finite(params)


class OneRateForAll(SGD):
    def update(self, p: nn.Parameter, lr: float) -> None:
        super().update(p, self.param_groups[0]["lr"])


class NeedsEveryGradient(SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, group["lr"])
        return loss


class TwoClosureCalls(SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


class SinglePrecisionOnly(SGD):
    def update(self, p: nn.Parameter, lr: float) -> None:
        p.data = (p - lr * p.grad).float()


class Ascends(SGD):
    def update(self, p: nn.Parameter, lr: float) -> None:
        p.add_(lr * p.grad)


def case_of(optimizer: type[torch.optim.Optimizer]) -> OptimizerCase:
    return OptimizerCase(optimizer, {"lr": 0.5}, bad=[({"lr": -1.0}, "lr must be")])


@pytest.mark.parametrize("check", optimizer_checks.CHECKS, ids=lambda check: check.__name__)
def test_a_correct_optimizer_passes(check) -> None:
    check(case_of(SGD))


@pytest.mark.parametrize(
    ("optimizer", "check"),
    [
        (WrongResume, "resumes_bit_exactly"),
        (RanksDrift, "ranks_agree_and_equal_the_joint_batch"),
        (NoValidation, "bad_arguments_raise_by_name"),
        (TakesInfiniteRates, "refuses_numbers_that_are_not_finite"),
        (ReadsTheRateOnce, "follows_a_learning_rate_schedule"),
        (SpoiledByNaN, "skips_steps_that_are_not_finite"),
        (SkipsInSilence, "skips_steps_that_are_not_finite"),
        (OneRateForAll, "keeps_learning_rates_of_groups_apart"),
        (NeedsEveryGradient, "skips_missing_gradients"),
        (TwoClosureCalls, "calls_the_closure_the_stated_number_of_times"),
        (SinglePrecisionOnly, "works_in_float64_and_bfloat16"),
        (Ascends, "decreases_a_quadratic"),
        (Ascends, "decreases_a_small_mlp_loss"),
    ],
)
def test_a_broken_optimizer_is_caught(optimizer, check) -> None:
    with pytest.raises((AssertionError, TypeError, AttributeError, RuntimeError, pytest.fail.Exception)):
        getattr(optimizer_checks, f"check_{check}")(case_of(optimizer))


class ForgetfulModule(LightningModule):
    """Carries a tensor between steps that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.average = torch.zeros(())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])
        self.average = 0.9 * self.average + 0.1 * loss.detach()
        return loss / (1 + self.average)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class DriftingModule(ForgetfulModule):
    """Steps outside of the gradient that DDP averages."""

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            self.layer.bias.add_(self.trainer.global_rank)


class ChattyModule(ForgetfulModule):
    """Logs over epochs without saying how ranks and batches combine."""

    def __init__(self, rate: float = 0.1, block: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.log("train/loss", torch.tensor(1), on_epoch=True)
        return super().training_step(batch, batch_idx)


def module_case(module: type[LightningModule]) -> ModuleCase:
    config = {
        "model": {"class_path": f"{__name__}.{module.__name__}"},
        "data": {"class_path": "lit_methods.datamodules.DigitsDataModule"},
    }
    return ModuleCase(config, lambda: ChattyModule(block=nn.ReLU()), lambda: (torch.ones(2, 64),), bad=[])


@pytest.mark.parametrize(
    ("module", "check"),
    [
        (ForgetfulModule, "resumes_bit_exactly_in_new_processes"),
        (DriftingModule, "ranks_stay_identical_under_ddp"),
        (ChattyModule, "logs_without_warnings"),
        (ChattyModule, "refuses_numbers_that_are_not_finite"),
        (ChattyModule, "directly_built_module_saves_plain_data"),
    ],
)
def test_a_broken_module_is_caught(module, check, tmp_path, monkeypatch) -> None:
    with pytest.raises((AssertionError, UserWarning, pickle.UnpicklingError, pytest.fail.Exception)):
        getattr(module_checks, f"check_{check}")(module_case(module), tmp_path, monkeypatch)


class ForgetfulCallback(Callback):
    """Counts, but keeps the count for itself."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.count = getattr(self, "count", 0) + 1


def test_a_broken_callback_is_caught(tmp_path) -> None:
    case = CallbackCase(ForgetfulCallback, bad=[])
    with pytest.raises(AssertionError, match="stores no state"):
        callback_checks.check_state_survives_a_checkpoint(case, tmp_path)


class UnseededData(LightningDataModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()

    def train_dataloader(self) -> StatefulDataLoader:
        return StatefulDataLoader(list(range(20)), batch_size=5, shuffle=True)


def test_a_broken_datamodule_is_caught(tmp_path) -> None:
    case = DataModuleCase(lambda folder, **arguments: UnseededData(**arguments), bad=[({"seed": -1}, "seed")])
    for check in ("batches_are_a_function_of_the_seed", "bad_arguments_raise_by_name"):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            getattr(datamodule_checks, f"check_{check}")(case, tmp_path)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("lit_methods/optim/new.py", "import lightning"),
        ("lit_methods/optim/new.py", "from lit_methods.supervised import SupervisedModule"),
        ("datamodules/new.py", "from lit_methods.optim import MFAC"),
        ("lit_methods/vi/new.py", "from lit_methods.datamodules import DigitsDataModule"),
        ("lit_methods/vi/new.py", "from lit_methods.rl.mdpo import OnPolicyMDPO"),
        ("lit_methods/vi/new.py", "from lit_methods import callbacks"),
        ("lit_methods/vi/new.py", "from . import mult_vae"),
        ("callbacks/new.py", "import datamodules"),
        ("lit_methods/batches.py", "import lightning"),
    ],
)
def test_a_forbidden_import_is_caught(file, line, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"import torch\n\n\ndef late():\n    {line}\n")
    assert len(forbidden_imports(tmp_path)) == 1
    path.write_text("import torch\n")
    assert forbidden_imports(tmp_path) == []


def test_a_stale_recipe_is_caught(tmp_path, monkeypatch, capsys) -> None:
    recipe = tmp_path / "mfac" / "stale.yaml"
    recipe.parent.mkdir()
    good = (ROOT / "recipes" / "mfac" / "digits.yaml").read_text()
    recipe.write_text(good)
    recipe_checks.check_parses_against_current_signatures(recipe, monkeypatch, capsys)
    recipe.write_text(good.replace("num_grads:", "ngrads:"))
    with pytest.raises(AssertionError, match="'ngrads' is not accepted; did you mean 'num_grads'"):
        recipe_checks.check_parses_against_current_signatures(recipe, monkeypatch, capsys)
    recipe.write_text(good.replace("# minutes: 1\n", ""))
    with pytest.raises(AssertionError, match="header keys"):
        recipe_checks.check_header_is_complete(recipe)
    recipe.write_text(good.replace("use_distributed_sampler: false", ""))
    with pytest.raises(AssertionError, match="use_distributed_sampler"):
        recipe_checks.check_resumes_exactly_by_its_settings(recipe)
    with pytest.raises(AssertionError, match="no README"):
        recipe_checks.check_readme_presents_it(recipe)


def test_a_missing_case_is_caught(tmp_path, monkeypatch) -> None:
    monkeypatch.delitem(test_contract.CASES["optimizer"], "lit_methods.optim.MFAC")
    with pytest.raises(AssertionError, match="has no case"):
        test_contract.test_piece("optimizer", "lit_methods.optim.MFAC", lambda: None, tmp_path, monkeypatch)


def test_an_exemption_without_reason_is_caught(monkeypatch) -> None:
    case = OptimizerCase(SGD, {}, bad=[], not_applicable={"check_resumes_bit_exactly": "no"})
    monkeypatch.setitem(test_contract.CASES["optimizer"], "toy", case)
    with pytest.raises(AssertionError, match="write why"):
        test_contract.test_every_exemption_names_a_check_and_gives_a_reason()
    with pytest.raises(AssertionError, match="cases without a public piece"):
        test_contract.test_every_case_belongs_to_a_piece()
