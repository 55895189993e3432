from pathlib import Path

import pytest
import scipy.stats
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_methods.callbacks import DaleMonitor
from lit_methods.optim import ExponentiatedGradient, eg_param_groups


class Scripted(LightningModule):
    """A module whose weights are set by hand, one list per epoch."""

    def __init__(self, values: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values[0]))
        self.values = values[1:]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.weight.data = torch.tensor(self.values[self.current_epoch])
        return self.weight.sum() * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    module: LightningModule, monitor: DaleMonitor, folder: Path, max_epochs: int, ckpt_path: Path | None = None
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[monitor],
        max_epochs=max_epochs,
    )
    trainer.fit(module, DataLoader(torch.zeros(1, 1)), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "last.ckpt")


def test_flips_are_counted_against_the_beginning_and_deaths_too(tmp_path: Path) -> None:
    monitor = DaleMonitor()
    epochs = [[1.0, -1.0, 0.0, 2.0], [2.0, 1.0, 1.0, 2.0], [2.0, -3.0, -1.0, 0.0], [-1.0, 1.0, 0.0, 0.0]]
    fit(Scripted(epochs), monitor, tmp_path, max_epochs=3)
    assert [(m["sign_flips"], m["dead"]) for m in monitor.history] == [(1, 0), (0, 1), (2, 1)]


def test_a_resumed_run_compares_with_the_first_beginning(tmp_path: Path) -> None:
    epochs = [[1.0, -1.0], [-1.0, -1.0], [-1.0, -2.0]]
    fit(Scripted(epochs), DaleMonitor(), tmp_path, max_epochs=1)
    monitor = DaleMonitor()
    fit(Scripted(epochs), monitor, tmp_path, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert [m["sign_flips"] for m in monitor.history] == [1, 1]


def test_shape_statistics_are_those_of_scipy(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(500).log_normal_(generator=generator) + 0.1
    values[::2] *= -1
    values[7] = 0.0
    monitor = DaleMonitor()
    fit(Scripted([values.tolist(), values.tolist()]), monitor, tmp_path, max_epochs=1)
    logs = values[values != 0].abs().double().log().numpy()
    measured = monitor.history[0]
    assert measured["skew"] == pytest.approx(scipy.stats.skew(logs))
    assert measured["kurtosis"] == pytest.approx(scipy.stats.kurtosis(logs))
    assert measured["ks"] == pytest.approx(scipy.stats.kstest(logs, "norm", args=(logs.mean(), logs.std())).statistic)


def test_groups_of_plain_descent_and_other_names_are_not_watched(tmp_path: Path) -> None:
    class Both(Scripted):
        def __init__(self) -> None:
            super().__init__([[1.0], [-1.0]])
            self.matrix = nn.Parameter(torch.ones(2, 2))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.matrix.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return ExponentiatedGradient(eg_param_groups(self))

    flips = {}
    for pattern in (None, "matrix", "weight"):
        monitor = DaleMonitor(pattern)
        fit(Both(), monitor, tmp_path, max_epochs=1)
        flips[pattern] = monitor.history[0]["sign_flips"]
    assert flips == {None: 0, "matrix": 0, "weight": 1}
    with pytest.raises(ValueError, match="pattern must match a trainable parameter, got 'nothing'"):
        fit(Both(), DaleMonitor("nothing"), tmp_path, max_epochs=1)
