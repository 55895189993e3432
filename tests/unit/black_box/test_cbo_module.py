import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lit_methods.black_box import CBOModule
from lit_methods.callbacks import CBOCooling
from lit_methods.datamodules import DigitsDataModule
from lit_methods.nets import PostNormMLP
from lit_methods.optim import CBO

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def fit(module: CBOModule, epochs: int, **trainer) -> Trainer:
    runner = Trainer(max_epochs=epochs, enable_checkpointing=False, use_distributed_sampler=False, **QUIET, **trainer)
    runner.fit(module, DigitsDataModule(batch_size=64))
    return runner


def test_learns_digits_from_losses() -> None:
    torch.manual_seed(0)
    module = CBOModule(
        PostNormMLP(64, [10]),
        num_classes=10,
        optimizer=lambda params: CBO(params, alpha=5.0, num_particles=60, particle_batch_size=20),
    )
    trainer = fit(module, 8)
    assert trainer.callback_metrics["val/accuracy"] > 0.3  # chance is 0.1
    assert all(p.grad is None for p in module.parameters())


def test_a_loss_without_gradient_and_running_statistics() -> None:
    class ZeroOne(nn.Module):
        def forward(self, outputs, y):
            return (outputs.argmax(1) != y).float().mean()

    torch.manual_seed(0)
    module = CBOModule(
        PostNormMLP(64, [10]),
        num_classes=10,
        loss=ZeroOne(),
        optimizer=lambda params: CBO(params, num_particles=10, particle_batch_size=None),
        chunk_size=4,
    )
    fit(module, 1, limit_train_batches=3)
    norm = module.network[-1]
    assert norm.num_batches_tracked == 3
    assert norm.running_mean.abs().sum() > 0


def test_other_optimizers_are_refused() -> None:
    module = CBOModule(nn.Linear(2, 2), num_classes=2, optimizer=torch.optim.Adam)
    with pytest.raises(TypeError, match=r"CBO or ConsensusHopping, got Adam.*SupervisedModule"):
        module.configure_optimizers()


def test_cooling_follows_the_formula_and_survives_a_checkpoint(tmp_path) -> None:
    torch.manual_seed(0)
    module = CBOModule(
        PostNormMLP(64, [10]),
        num_classes=10,
        optimizer=lambda params: CBO(params, sigma=1.0, alpha=5.0, num_particles=30, particle_batch_size=5),
    )
    cooling = CBOCooling(every_n_epochs=2, reduction=0.5)
    trainer = fit(module, 5, limit_train_batches=3, callbacks=[cooling])
    group = trainer.optimizers[0].param_groups[0]
    assert group["sigma"] == pytest.approx(math.log2(2) / math.log2(3) * math.log2(3) / math.log2(4))
    assert group["alpha"] == 20.0
    assert cooling.coolings == 2
    assert group["num_particles"] < 30
    assert group["num_particles"] % 5 == 0
    assert len(trainer.optimizers[0].particles["1.weight"]) == group["num_particles"]

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again, cooler = CBOModule(PostNormMLP(64, [10]), num_classes=10), CBOCooling(every_n_epochs=2, reduction=0.5)
    runner = Trainer(max_epochs=6, enable_checkpointing=False, limit_train_batches=3, callbacks=[cooler], **QUIET)
    runner.fit(again, DigitsDataModule(batch_size=64), ckpt_path=tmp_path / "last.ckpt")
    assert cooler.coolings == 3
    assert runner.optimizers[0].param_groups[0]["alpha"] == 40.0
