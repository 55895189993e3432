"""Where a prior puts chance, measured on a network whose prior is known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.callbacks import PriorRollouts
from lit_methods.datamodules import SinesDataModule, SymbolicMarkovDataModule
from lit_methods.vi import PVRNN, PVRNNModule
from tests.contract.callback_checks import UnrelatedModule

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "use_distributed_sampler": False, "max_epochs": 2,
}  # fmt: skip


def fit(folder: Path, callback: PriorRollouts, network: PVRNN) -> Trainer:
    module = PVRNNModule(network, seed=0, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    trainer = Trainer(callbacks=[callback], default_root_dir=folder, **QUIET)
    trainer.fit(module, SymbolicMarkovDataModule(seq_len=7))
    return trainer


def test_measures_what_the_prior_does(tmp_path: Path) -> None:
    network = PVRNN(1, [2], [1], [1.0], output="linear")
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        network.bias[5] = -1.0  # log sigma_p
        network.latent[0] = 0.1
        network.readout.weight[0, 0] = 1.0
    callback = PriorRollouts(num_rollouts=4000, period=3, burn_in=1, every_n_epochs=2)
    trainer = fit(tmp_path, callback, network)
    assert (tmp_path / "prior_rollouts.png").stat().st_size > 10_000
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert len(callback.history) == 1
    for phase in range(3):
        assert logged[f"prior/sigma/{phase}"] == pytest.approx(torch.tensor(-1.0).exp().item())
        assert logged[f"prior/above/{phase}"] == pytest.approx(0.5, abs=0.02)
    assert (logged["data/above/1"], logged["data/above/2"]) == (0, 1)
    assert logged["prior/memorised"] == pytest.approx(8 / 2**7, abs=0.05)  # at most eight series of seven signs
    again = PriorRollouts()
    again.load_state_dict(callback.state_dict())
    assert again.history == callback.history


def test_memorised_is_one_where_every_run_is_a_series(tmp_path: Path) -> None:
    network = PVRNN(1, [1], [1], [1.0], output="linear")
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        network.readout.bias.fill_(1.0)
    module = PVRNNModule(network, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    data = SinesDataModule(period=4, seq_len=1, train_size=4, test_size=0)
    callback = PriorRollouts(num_rollouts=10, burn_in=0, every_n_epochs=1)
    Trainer(callbacks=[callback], default_root_dir=tmp_path, **QUIET).fit(module, data)
    assert callback.history[-1]["prior/memorised"] == 1


def test_refuses_other_modules(tmp_path: Path) -> None:
    trainer = Trainer(callbacks=[PriorRollouts()], default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="needs a module with a PVRNN as network, got UnrelatedModule"):
        trainer.fit(UnrelatedModule())
