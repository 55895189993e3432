"""What every callback promises."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.contract.cases.kinds import CallbackCase
from tests.contract.compare import assert_same


class UnrelatedModule(LightningModule):
    """Somebody's own module, which knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.layer(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(24, 4, generator=generator), torch.arange(24) % 3)
        return DataLoader(data, batch_size=8)

    val_dataloader = train_dataloader
    test_dataloader = train_dataloader


def fit_unrelated_module(case: CallbackCase, folder: Path, *others: Callback) -> Path:
    """Fit two epochs with the callback and others; returns the last checkpoint."""
    checkpoint = ModelCheckpoint(dirpath=folder, save_last=True)
    trainer = Trainer(
        max_epochs=2,
        accelerator=case.accelerator,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[*others, case.make(), checkpoint],
    )
    trainer.fit(UnrelatedModule())
    return folder / "last.ckpt"


def check_attaches_to_an_unrelated_module(case: CallbackCase, folder: Path) -> None:
    fit_unrelated_module(case, folder)


def check_works_beside_averages_of_weights(case: CallbackCase, folder: Path) -> None:
    if reason := case.not_applicable.get("check_attaches_to_an_unrelated_module"):
        pytest.skip(reason)
    averages = {
        "plain": WeightAveraging(),
        "ema": EMAWeightAveraging(decay=0.9),
        "swa": StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    }
    for name, average in averages.items():
        saved = torch.load(fit_unrelated_module(case, folder / name, average), weights_only=True)
        module = UnrelatedModule()
        module.load_state_dict(saved["state_dict"])
        assert all(p.isfinite().all() for p in module.parameters())


def check_state_survives_a_checkpoint(case: CallbackCase, folder: Path) -> None:
    saved = torch.load(fit_unrelated_module(case, folder), weights_only=True)
    callback = case.make()
    assert callback.state_key in saved["callbacks"], "the callback stores no state"
    state = saved["callbacks"][callback.state_key]
    callback.load_state_dict(state)
    assert_same(callback.state_dict(), state)


def check_bad_arguments_raise_by_name(case: CallbackCase, folder: Path) -> None:
    for build, message in case.bad:
        with pytest.raises(ValueError, match=message):
            build()


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]
