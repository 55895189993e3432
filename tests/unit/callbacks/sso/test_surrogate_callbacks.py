"""TargetCapture and SurrogateMonitor in real Trainers."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lit_methods.callbacks import SurrogateMonitor, TargetCapture
from lit_methods.datamodules import BreastCancerDataModule
from lit_methods.optim import SSO
from lit_methods.optim.sso import GaussNewton
from lit_methods.supervised import SSOModule, SupervisedModule


def fit(module: LightningModule, *callbacks: Callback, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        **quiet,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        max_epochs=2,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, BreastCancerDataModule(batch_size=100))
    return trainer


def linear(module_class: type[SupervisedModule], **options) -> SupervisedModule:
    torch.manual_seed(0)
    return module_class(
        nn.Linear(30, 1),
        loss=nn.BCEWithLogitsLoss(),
        optimizer=lambda params: SSO(params, **{"lr": None, "loss": "bce", "inner": GaussNewton(steps=5)} | options),
    )


def bce(module: LightningModule, batch) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(module(batch[0]), batch[1])


def test_capture_under_an_ordinary_module_equals_the_module_made_for_it() -> None:
    captured, closed = linear(SupervisedModule), linear(SSOModule)
    fit(captured, TargetCapture("network"))
    fit(closed)
    for p, q in zip(captured.parameters(), closed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_monitor_records_the_steps_and_the_majorisation() -> None:
    monitor = SurrogateMonitor(criterion=bce)
    trainer = fit(linear(SupervisedModule), TargetCapture(), monitor)
    assert [row["step"] for row in monitor.history] == list(range(1, 9))
    for row in monitor.history:
        assert row["eta"] == 4.0
        assert row["decrease"] > 0
        assert row["loss_ratio"] >= 1 - 1e-4, "for eta = 1/L the surrogate bounds the loss from above"
    assert trainer.callback_metrics["surrogate/eta"] == 4.0
    too_long = SurrogateMonitor(every_n_steps=3, criterion=bce)
    fit(linear(SSOModule, lr=4000.0, inner="cg"), too_long)
    assert [row["step"] for row in too_long.history] == [3, 6]
    assert min(row["loss_ratio"] for row in too_long.history) < 0.5


def test_monitor_warns_of_clipping_and_ignores_other_optimizers() -> None:
    with pytest.warns(UserWarning, match="max_target_grad_norm"):
        fit(linear(SupervisedModule), TargetCapture(), SurrogateMonitor(), gradient_clip_val=1.0)
    monitor = SurrogateMonitor()
    fit(SupervisedModule(nn.Linear(30, 1)), monitor)
    assert monitor.history == []


def test_capture_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="needs a module whose optimizer is an SSO, got Adam"):
        fit(SupervisedModule(nn.Linear(30, 1)), TargetCapture())
    with pytest.raises(ValueError, match="module='net' is no submodule of SupervisedModule: network"):
        fit(linear(SupervisedModule), TargetCapture("net"))


def test_a_second_fit_replaces_the_first_optimizers_hooks() -> None:
    module = linear(SupervisedModule)
    fit(module, TargetCapture())
    fit(module, TargetCapture())
    assert len(module.network._forward_hooks) == len(module.network._forward_pre_hooks) == 1
