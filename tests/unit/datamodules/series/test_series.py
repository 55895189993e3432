"""What the series hold, against formulas and the files they are from."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from lit_methods.datamodules import (
    BridgeDataModule,
    FractionalPathDataModule,
    MovingDigitsDataModule,
    StockVolatilityDataModule,
)
from lit_methods.datamodules.series.fractional_paths import _reverting
from lit_methods.fractional_noise import fbm_covariance, sample_fbm
from tests.standins.idx_files import write_mnist


def ready(data):
    data.setup("fit")
    return data


def test_a_bridge_repeats_its_observations() -> None:
    data = ready(BridgeDataModule([1.0, 2.0], [0.5, -1.0], batch_size=4, steps_per_epoch=3, eval_size=7))
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    assert batches[0].times.tolist() == [0.0, 1.0, 2.0]
    assert batches[0].values.shape == (4, 3, 1)
    assert (batches[0].values[:, 1:, 0] == torch.tensor([0.5, -1.0])).all()
    assert batches[0].mask.tolist() == [[False, True, True]] * 4
    assert sum(len(batch.mask) for batch in data.val_dataloader()) == 7


def test_paths_have_the_covariance_and_the_noise() -> None:
    data = ready(
        FractionalPathDataModule(
            0.3, "II", num_times=4, t_max=2.0, train_size=20_000, val_size=0, test_size=0, scale=2.0, missing=0.25
        )
    )
    paths, times = data.paths[:, 1:], torch.tensor([0.5, 1.0, 1.5, 2.0])
    expected = 4 * fbm_covariance(times[:, None], times, 0.3, "II")
    error = (expected.diag()[:, None] * expected.diag() + expected**2).div(len(paths)).sqrt()
    assert ((paths.T @ paths / len(paths) - expected).abs() < 4.5 * error).all()
    batch = data.train_data
    assert (batch.values.isnan()[..., 0] == ~batch.mask).all()
    assert not batch.mask[:, 0].any()
    assert batch.mask[:, 1:].float().mean().item() == pytest.approx(0.75, abs=0.01)
    noise = (batch.values[..., 0] - data.paths)[batch.mask]
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)


def test_mean_reversion_follows_the_driving_noise() -> None:
    """Of ordinary noise: the Ornstein-Uhlenbeck process; and what a fine Euler path of the same noise gives."""
    arguments = {"num_times": 3, "t_max": 1.5, "train_size": 20_000, "val_size": 0, "test_size": 0, "obs_std": 0.0}
    data = ready(FractionalPathDataModule(0.5, rate=2.0, **arguments))
    times = torch.tensor([0.0, 0.5, 1.0, 1.5])
    torch.testing.assert_close(data.paths.var(0), ((1 - torch.exp(-4 * times)) / 4).double(), rtol=0.05, atol=1e-6)
    free = sample_fbm(torch.arange(1001) / 1000, 0.3, 2, generator=torch.Generator().manual_seed(0))
    euler, now = [torch.zeros(2).double()], torch.zeros(2).double()
    for step in free.diff(dim=1).T:
        now = now - 2.0 * now / 1000 + step
        euler.append(now)
    torch.testing.assert_close(_reverting(free, 2.0, 1e-3), torch.stack(euler, 1), rtol=0.01, atol=5e-3)


def test_volatility_is_that_of_the_file() -> None:
    data = ready(StockVolatilityDataModule(window=32, stride=7))
    prices = np.load(Path(matplotlib.get_data_path()) / "sample_data" / "goog.npz")["price_data"]
    assert int((~data.series.isnan()).sum()) == len(prices) == 1047
    first = np.sqrt(np.log(prices["high"][0] / prices["low"][0]) ** 2 / (4 * np.log(2)))
    assert data.series[0].item() == pytest.approx(np.log(first))
    assert prices["date"][0] + np.timedelta64(len(data.series) - 1) == prices["date"][-1]
    batch = next(iter(data.train_dataloader()))
    assert batch.times.tolist() == [i / 32 for i in range(32)]
    assert batch.mask.float().mean().item() == pytest.approx(252 / 365, abs=0.03)
    values = data.train_data.values[data.train_data.mask]
    assert abs(values.mean()) < 0.1
    assert values.std().item() == pytest.approx(1, abs=0.1)
    ends = [int(share * len(data.series)) for share in (0.7, 0.85)]
    start = (data.series[ends[0] : ends[0] + 32] - data.mean) / data.std
    torch.testing.assert_close(data.val_data.values[0, :, 0], start.float(), equal_nan=True)
    assert len(data.test_data.mask) == (len(data.series) - ends[1]) // 32


def test_digits_fly_straight_and_bounce() -> None:
    data = ready(MovingDigitsDataModule(train_size=300, num_frames=40, val_size=2, test_size=2))
    corners = data.train_data.corners.long()
    assert corners.shape == (300, 2, 40, 2)
    assert corners.min() == 0
    assert corners.max() == 16
    steps = corners.diff(dim=2)
    assert steps.abs().max() == 4
    inside = ((corners > 0) & (corners < 16)).all(-1)
    free = inside[:, :, 1:-1] & inside[:, :, 2:]
    assert (steps[:, :, 1:] == steps[:, :, :-1]).all(-1)[free].all()
    at_wall = (corners[:, :, 1:-1] == 0) & (steps[:, :, :-1] < 0)
    assert (steps[:, :, 1:][at_wall] >= 0).all()
    assert at_wall.any()


def test_frames_hold_the_digits_where_the_tracks_say() -> None:
    data = ready(
        MovingDigitsDataModule(train_size=4, num_frames=3, val_size=2, test_size=50, batch_size=4, num_digits=1)
    )
    batch = next(iter(data.val_dataloader()))
    assert batch.values.shape == (2, 3, 1, 32, 32)
    torch.testing.assert_close(batch.times, torch.tensor([0.0, 0.1, 0.2]))
    assert batch.mask.all()
    for row in range(2):
        for frame in range(3):
            top, left = data.val_data.corners[row, 0, frame].tolist()
            sprite = data.sprites[data.val_data.digits[row, 0]]
            torch.testing.assert_close(batch.values[row, frame, 0, top : top + 16, left : left + 16], sprite)
            assert batch.values[row, frame].sum().item() == pytest.approx(sprite.sum().item(), rel=1e-5)
    assert data.test_data.digits.min() >= 1797 - 360 > data.train_data.digits.max()


def test_digits_may_be_those_of_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = MovingDigitsDataModule(
        str(tmp_path), size=64, digit_size=32, train_size=2, val_size=0, test_size=2, num_frames=3
    )
    data.prepare_data()
    batch = next(iter(ready(data).train_dataloader()))
    assert batch.values.shape == (2, 3, 1, 64, 64)
    assert 0 <= batch.values.min() < batch.values.max() <= 1
