"""The exact posterior that the callback compares with, and what it writes."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.callbacks import PathPosterior
from lit_methods.datamodules import BridgeDataModule, FractionalPathDataModule
from lit_methods.vi import (
    ControlMLP,
    DriftMLP,
    FractionalSDE,
    FractionalSDEModule,
    LinearDrift,
    MarkovFBM,
    SeriesEncoder,
    linear_covariance,
)
from tests.contract.module_checks import QUIET
from tests.unit.vi.fractional_sde.test_sde import BestControl


def linear(noise: MarkovFBM, rate: float = 0.0, s: float = 1.0, control=None, **more) -> FractionalSDE:
    return FractionalSDE(LinearDrift(rate), s, control, noise, 1, **more)


@pytest.mark.parametrize("kind", ["I", "II", "white"])
def test_the_covariance_of_a_linear_sde(kind: str) -> None:
    noise = MarkovFBM(time_horizon=2.0, kind=kind, hurst=0.5 if kind == "white" else 0.3)
    times = torch.tensor([0.0, 0.3, 1.0, 1.7], dtype=torch.float64)
    free = linear_covariance(linear(noise, s=2.0), times)
    torch.testing.assert_close(free, 4 * noise.covariance(times[:, None], times), rtol=1e-6, atol=1e-9)
    reverting = linear_covariance(linear(noise, 1.5), times)
    sampled = linear(noise, 1.5, exact_ou=True, dt=0.01).sample_prior(
        torch.zeros(10_000, 1).double(), times, generator=torch.Generator().manual_seed(0)
    )
    x = sampled.x[..., 0]
    torch.testing.assert_close(x.T @ x / len(x), reverting, rtol=0.06, atol=0.02)
    if kind == "white":
        t, s = times[:, None], times
        exact = (torch.exp(-1.5 * (t - s).abs()) - torch.exp(-1.5 * (t + s))) / 3
        torch.testing.assert_close(reverting, exact)
    with pytest.raises(ValueError, match="sde must have a LinearDrift"):
        linear_covariance(FractionalSDE(DriftMLP(1), 1.0, None, noise, 1), times)


def test_the_exact_control_is_found_to_be_exact(tmp_path: Path) -> None:
    noise = MarkovFBM(time_horizon=2.0, hurst=0.7)
    sde = linear(noise, control=BestControl(noise, 0.7, 2.0, 0.1), dt=0.01)
    module, data = FractionalSDEModule(sde, obs_std=0.1, seed=0).double(), BridgeDataModule([2.0], [0.7], eval_size=500)
    callback = PathPosterior(num_paths=2000, num_times=11)
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[callback], precision="64-true")
    (found,) = trainer.test(module, data, verbose=False)
    evidence = noise.log_prob(torch.tensor([2.0]), torch.tensor([0.7]), 0.1).item()
    assert found["test/log_evidence"] == pytest.approx(evidence, abs=1e-5)
    assert found["test/std_error"] < 0.05
    assert (tmp_path / "paths.png").stat().st_size > 10_000


def test_a_model_with_an_encoder_is_drawn_at_its_own_times(tmp_path: Path) -> None:
    sde = FractionalSDE(DriftMLP(1, [8]), 1.0, ControlMLP(1, 5, [8], 4), MarkovFBM(time_horizon=2.0), 1, dt=0.02)
    module = FractionalSDEModule(sde, SeriesEncoder(1, 1, 4, 8), seed=0)
    data = FractionalPathDataModule(num_times=6, missing=0.3, test_size=4)
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[PathPosterior(num_paths=4)])
    (found,) = trainer.test(module, data, verbose=False)
    assert "test/log_evidence" not in found
    assert (tmp_path / "paths.png").exists()
