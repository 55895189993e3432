import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_methods.callbacks import EmpiricalFisherMonitor


class Linear(LightningModule):
    """Frozen in place (lr = 0), with a gradient that is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, bias=False)
        self.x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).mean()  # gradient: the mean of the inputs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.x), batch_size=4)


def fit(monitor: EmpiricalFisherMonitor, module: LightningModule, epochs: int = 3) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor],
    )
    trainer.fit(module)
    return trainer


def test_spectrum_equals_that_of_the_dense_fisher():
    module = Linear()
    monitor = EmpiricalFisherMonitor(num_grads=8, batch_size=1, num_eigenvalues=3, every_n_epochs=2)
    trainer = fit(monitor, module)
    fisher = module.x.T.double() @ module.x.double() / 8  # every sample once: one pass over the data
    expected = torch.linalg.eigvalsh(fisher).flip(0)
    assert [point["step"] for point in monitor.history] == [2, 6]
    for point in monitor.history:
        torch.testing.assert_close(torch.tensor(point["eigenvalues"]).double(), expected, rtol=1e-5, atol=1e-7)
        assert point["trace"] == pytest.approx(float(expected.sum()), rel=1e-5)
    logged = trainer.callback_metrics
    assert logged["fisher/trace"] == pytest.approx(float(expected.sum()), rel=1e-5)
    assert logged["fisher/eigenvalue_1"] == pytest.approx(float(expected[0]), rel=1e-5)


def test_own_batches_and_criterion():
    module = Linear()
    monitor = EmpiricalFisherMonitor(
        num_grads=4,
        num_eigenvalues=1,
        criterion=lambda module, batch: 2 * module.layer(batch[0]).mean(),
        dataloader=DataLoader(TensorDataset(module.x), batch_size=8),
    )
    fit(monitor, module, epochs=1)
    assert monitor.history[0]["trace"] == pytest.approx(4 * float(module.x.mean(0).square().sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_grads": 0}, "num_grads must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"every_n_epochs": 0}, "every_n_epochs must be >= 1, got 0"),
        ({"num_eigenvalues": 0}, r"num_eigenvalues must be in \[1, num_grads=64\], got 0"),
        ({"num_grads": 2}, r"num_eigenvalues must be in \[1, num_grads=2\], got 3"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EmpiricalFisherMonitor(**arguments)
