"""MFACPruning and EmpiricalFisherMonitor under DDP on two real gloo processes."""

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_methods.callbacks import EmpiricalFisherMonitor, MFACPruning
from tests.distributed.launch import run_ranks
from tests.new_processes import act_as_torchrun


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 2)).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self) -> DataLoader:
        x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8, shuffle=True)


class RecordingPruning(MFACPruning):
    grads: Tensor

    def prune_to(self, sparsity: float, gradients: Any, distributed: bool = False) -> None:
        def recorded(*args: Any) -> Tensor:
            grads = gradients(*args)
            if not hasattr(self, "grads"):
                self.grads = grads
            return grads

        super().prune_to(sparsity, recorded, distributed)


def fit(**trainer: Any) -> dict[str, Any]:
    module = Classifier()
    pruner = RecordingPruning(schedule={1: 0.5, 2: 0.75}, num_grads=9, batch_size=8, recomputations=3, block_size=16)
    monitor = EmpiricalFisherMonitor(num_grads=8, batch_size=4)
    pl.seed_everything(0, verbose=False)
    pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[pruner, monitor],
        **trainer,
    ).fit(module)
    return {
        "weights": torch.cat([p.detach().flatten() for p in module.parameters()]),
        "masks": torch.cat([mask.flatten() for mask in pruner.masks.values()]),
        "zeros": torch.cat([module.net[0].weight.flatten(), module.net[3].weight.flatten()]).detach() == 0,
        "grads": pruner.grads,
        "history": monitor.history,
    }


def ranks(rank: int) -> dict[str, Any]:
    act_as_torchrun(rank, 2)
    warnings.simplefilter("ignore")
    return fit(devices=2, strategy="ddp")


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(ranks, 2)


def test_ranks_agree_on_masks_and_weights(results):
    first, second = results
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["masks"], second["masks"])
    assert torch.equal(first["masks"], ~first["zeros"])
    assert int(first["zeros"].sum()) == 60


def test_each_rank_computes_its_share_of_the_gradients(results):
    """Nine gradients become ten on two ranks: the same ten everywhere, no two alike."""
    grads = results[0]["grads"]
    assert torch.equal(grads, results[1]["grads"])
    assert grads.shape == (10, 80)
    assert len(torch.unique(grads, dim=0)) == 10


def test_ranks_measure_the_same_spectrum(results):
    first, second = (result["history"] for result in results)
    assert first == second
    assert len(first) == 3
    assert all(point["eigenvalues"] == sorted(point["eigenvalues"], reverse=True) for point in first)
