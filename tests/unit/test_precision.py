"""A checkpoint is not rounded on its way into a module."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_methods.callbacks import ExactResume
from lit_methods.datamodules import SensingDataModule
from lit_methods.sensing import SymmetricSensing
from tests.contract.callback_checks import UnrelatedModule

THIRD = 1 / 3  # not a float32


def trainer(*callbacks: ExactResume, precision: str = "64-true", steps: int = 0) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(**quiet, precision=precision, max_steps=steps, enable_checkpointing=False, callbacks=list(callbacks))


def sensing() -> SymmetricSensing:
    return SymmetricSensing(4, 2, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of float64 weights, 1/3 each."""
    module = sensing().double()
    for p in module.parameters():
        nn.init.constant_(p, THIRD)
    run = trainer(ExactResume())
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "double.ckpt")
    return tmp_path / "double.ckpt"


def is_exact(module: LightningModule) -> bool:
    return all(p.dtype == torch.float64 and bool((p == THIRD).all()) for p in module.parameters())


@pytest.mark.parametrize("callbacks", [[], [ExactResume()]], ids=["plain", "ExactResume"])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_64_true(checkpoint: Path, stage: str, callbacks: list[ExactResume]) -> None:
    module, data = sensing(), SensingDataModule(4, rank=1, num_measurements=20)
    getattr(trainer(*callbacks), stage)(module, datamodule=data, ckpt_path=checkpoint)
    assert is_exact(module)


def test_load_from_checkpoint_widens_and_a_trainer_narrows(checkpoint: Path) -> None:
    module = SymmetricSensing.load_from_checkpoint(checkpoint, weights_only=True)
    assert is_exact(module)
    again = sensing()
    trainer(precision="bf16-true").validate(again, SensingDataModule(4, rank=1, num_measurements=20), checkpoint)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


class Sums(UnrelatedModule):
    """Somebody's module, which keeps a sum in float64 whatever the Trainer's precision is."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def on_fit_start(self) -> None:
        self.total = self.total.double()

    def on_train_batch_end(self, *args: object) -> None:
        self.total += THIRD


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_buffers_that_are_wider_than_the_precision(tmp_path: Path, precision: str) -> None:
    first = trainer(ExactResume(), precision=precision, steps=3)
    first.fit(Sums())
    first.save_checkpoint(tmp_path / "sums.ckpt")
    second, module = trainer(ExactResume(), precision=precision, steps=6), Sums()
    second.fit(module, ckpt_path=tmp_path / "sums.ckpt", weights_only=True)
    assert float(module.total) == sum([THIRD] * 6)
    module = Sums()
    second.validate(module, ckpt_path=tmp_path / "sums.ckpt", verbose=False)
    assert float(module.total) == sum([THIRD] * 3)
    assert module.layer.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float64)
