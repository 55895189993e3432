"""Modules whose layers come late are averaged all the same."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lit_methods.datamodules import MovieLensDataModule
from lit_methods.swa import renew_swa_copy
from lit_methods.vi import MultVAE
from tests.standins.interaction_files import write_u_data


def test_late_layers_are_averaged(tmp_path: Path) -> None:
    write_u_data(tmp_path)
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    weights: list[torch.Tensor] = []

    class Remember(MultVAE):
        def on_train_epoch_start(self) -> None:
            weights.append(self.item_bias.detach().clone())

    module = Remember(None, hidden_dims=(4,), latent_dim=2)
    data = MovieLensDataModule("100k", data_dir=str(tmp_path), num_heldout_users=10, batch_size=8)
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[swa], default_root_dir=tmp_path,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    torch.testing.assert_close(module.item_bias, torch.stack(weights).mean(0))


def test_without_a_trainer_there_is_nothing_to_renew() -> None:
    renew_swa_copy(MultVAE(5, hidden_dims=(4,), latent_dim=2))
