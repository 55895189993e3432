import math

import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.black_box import CBOModule
from lit_methods.callbacks import CBOCooling
from lit_methods.datamodules import DigitsDataModule
from lit_methods.nets import PostNormMLP
from lit_methods.optim import CBO
from lit_methods.optim.cbo import ParticleBatches

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "use_distributed_sampler": False,
    "limit_train_batches": 3,
}


def test_cooling_follows_the_formula_and_survives_a_checkpoint(tmp_path) -> None:
    torch.manual_seed(0)
    module = CBOModule(
        PostNormMLP(64, [10]),
        num_classes=10,
        optimizer=lambda params: CBO(params, sigma=1.0, alpha=5.0, num_particles=30, batches=ParticleBatches(5)),
    )
    cooling = CBOCooling(every_n_epochs=2, reduction=0.5)
    trainer = Trainer(max_epochs=5, callbacks=[cooling], **QUIET)
    trainer.fit(module, DigitsDataModule(batch_size=64))
    group = trainer.optimizers[0].param_groups[0]
    assert group["sigma"] == pytest.approx(math.log2(2) / math.log2(3) * math.log2(3) / math.log2(4))
    assert group["alpha"] == 20.0
    assert cooling.coolings == 2
    assert group["num_particles"] < 30
    assert group["num_particles"] % 5 == 0
    assert len(trainer.optimizers[0].particles["1.weight"]) == group["num_particles"]

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again, cooler = CBOModule(PostNormMLP(64, [10]), num_classes=10), CBOCooling(every_n_epochs=2, reduction=0.5)
    runner = Trainer(max_epochs=6, callbacks=[cooler], **QUIET)
    runner.fit(again, DigitsDataModule(batch_size=64), ckpt_path=tmp_path / "last.ckpt")
    assert cooler.coolings == 3
    assert runner.optimizers[0].param_groups[0]["alpha"] == 40.0
