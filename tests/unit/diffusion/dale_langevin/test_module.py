"""The module: moments, scores, samples, likelihood, refusals."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lit_methods.batches import SupervisedBatch
from lit_methods.callbacks import LikelihoodEvaluation
from lit_methods.datamodules import TensorDataModule
from lit_methods.diffusion import (
    DLS,
    UMS,
    GeometricBrownian,
    MultiplicativeDiffusion,
    PositiveData,
    Sampling,
    TimeMLP,
)
from lit_methods.diffusion.dale_langevin.network import log_moments
from tests.distributed.launch import run_ranks

FINE = GeometricBrownian(t_min=1e-6)


class LogNormalNoise(nn.Module):
    """The exact network for log-normal data: its standardised input times its share of the noise."""

    def __init__(self, std: float, process: GeometricBrownian) -> None:
        super().__init__()
        self.std, self.process = std, process

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.process.t_min ** (1 - t)  # the network is told where log t lies
        sigma = self.process.sigma(t).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return x * sigma / (sigma**2 + self.std**2).sqrt()


def lognormal_rows(n: int, mean: float, std: float, features: int = 1) -> Tensor:
    return (mean + std * torch.randn(n, features, generator=torch.Generator().manual_seed(0))).exp()


def exact_model(mean: float, std: float, process: GeometricBrownian = FINE, **data: Any) -> MultiplicativeDiffusion:
    """A model that is exact for log-normal data of these moments."""
    model = MultiplicativeDiffusion(
        LogNormalNoise(std, process), [1], process, PositiveData(**({"shift": 0.0, "range": None} | data))
    )
    ones = torch.ones((), dtype=torch.float64)
    model.network.set_moments(ones, mean * ones[None], (mean**2 + std**2) * ones[None])
    return model


def test_moments_are_those_of_the_logarithm_by_pixel_channel_or_all_together() -> None:
    x = torch.rand(50, 2, 3, 3) + 0.5
    log = (x + 1).log()
    for prior, dims in (("pixel", [0]), ("channel", [0, 2, 3]), ("scalar", [0, 1, 2, 3])):
        model = MultiplicativeDiffusion(TimeMLP([2, 3, 3], width=8), [2, 3, 3], data=PositiveData(prior=prior))  # type: ignore[arg-type]
        model.fit_moments([(x[:20],), (x[20:],)])
        mean, variance = log.mean(dims), log.var(dims, correction=0)
        torch.testing.assert_close(model.network.log_mean.flatten(), mean.flatten(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.network.log_variance.flatten(), variance.flatten(), rtol=1e-4, atol=1e-6)
    model = MultiplicativeDiffusion(TimeMLP([2, 3, 3], width=8), [2, 3, 3], data=PositiveData(max_batches=1))
    model.fit_moments([(x[:20],), (x[20:],)])
    assert float(model.network.log_count) == 20


def unequal_share(rank: int) -> tuple[Tensor, ...]:
    share = torch.tensor([[1.0], [2.0], [3.0]] if rank == 0 else [[10.0]])
    sums = log_moments([share], GeometricBrownian())
    for value in sums:
        torch.distributed.all_reduce(value)
    model = MultiplicativeDiffusion(TimeMLP([1], width=8), [1])
    model.network.set_moments(*sums)
    return model.network.log_mean


def test_ranks_with_unequal_shares_find_the_moments_of_all_data() -> None:
    for mean in run_ranks(unequal_share, 2):
        assert float(mean) == pytest.approx(1.0236, abs=1e-4)  # the mean of the ranks' means is 1.4499


def test_training_finds_the_moments_once_and_a_checkpoint_keeps_them(tmp_path: Path) -> None:
    rows = SupervisedBatch(lognormal_rows(64, 0.5, 0.3), torch.zeros(64))
    data = TensorDataModule(train=rows, test=SupervisedBatch(rows.x[:32], rows.y[:32]), batch_size=16)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    model = MultiplicativeDiffusion(TimeMLP([1], width=8), [1], data=PositiveData(0.0, None), seed=0)
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, use_distributed_sampler=False, **quiet)  # type: ignore[arg-type]
    trainer.fit(model, data)
    torch.testing.assert_close(model.network.log_mean, rows.x.log().mean(0))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = MultiplicativeDiffusion.load_from_checkpoint(tmp_path / "saved.ckpt", net=TimeMLP([1], width=8))
    assert torch.equal(loaded.network.log_mean, model.network.log_mean)
    samples: Any = trainer.predict(loaded, data)
    assert not torch.equal(samples[0], samples[1]), "each batch has noise of its own"


def test_log_normal_data_with_a_mean_of_50_comes_back_with_a_mean_of_50() -> None:
    model = exact_model(math.log(50) - 0.045, 0.3)
    generator = torch.Generator().manual_seed(0)
    for solver, steps in ((DLS(), 200), ("dpmpp_2m", 20)):
        x = model.sample(20_000, solver=solver, steps=steps, generator=generator)  # type: ignore[arg-type]
        assert float(x.mean()) == pytest.approx(50, rel=0.02)
        assert model.clamped is None


def test_samples_lose_the_shift_and_are_clamped_once_at_the_end() -> None:
    model = exact_model(0.4, 0.5, shift=1.0, range=(1.0, 2.0))
    x = model.sample(5000, solver=DLS(), steps=100, generator=torch.Generator().manual_seed(0))
    assert float(x.min()) == 0
    assert float(x.max()) == 1
    normal = torch.distributions.Normal(0.4, 0.5)
    outside = float(normal.cdf(torch.tensor(0.0)) + 1 - normal.cdf(torch.tensor(2.0).log()))
    seen = []
    again = model.sample(
        5000,
        solver="dls",
        steps=100,
        generator=torch.Generator().manual_seed(0),
        on_step=lambda *step: seen.append(step),
    )
    assert torch.equal(again, x)
    times, noisy, clean = zip(*seen, strict=True)
    assert times[0] == 1
    assert times[-1] == pytest.approx(0.01)
    assert float(torch.stack(noisy).min()) > -1, "in units of the data"
    torch.testing.assert_close(clean[-1].clamp(0, 1), x)
    assert float(model.clamped) == pytest.approx(outside, abs=0.02)  # type: ignore[arg-type]


def test_likelihood_is_that_of_log_normal_data() -> None:
    model = exact_model(0.1, 0.3)
    x = torch.tensor([[1.5], [0.7]])
    exact = torch.distributions.LogNormal(0.1, 0.3).log_prob(x)[:, 0]
    assert float(exact[0]) == pytest.approx(-0.638814, abs=1e-6)
    torch.testing.assert_close(model.log_prob(x, probes=None, steps=100), exact, rtol=0, atol=2e-3)
    shifted = exact_model(0.1, 0.3, shift=0.5)
    torch.testing.assert_close(shifted.log_prob(x - 0.5, probes=None), exact, rtol=0, atol=2e-3)
    channels = exact_model(0.1 / 0.5, 0.3 / 0.5, GeometricBrownian(volatility=[0.5], t_min=1e-6))
    torch.testing.assert_close(channels.log_prob(x, probes=None), exact, rtol=0, atol=2e-3)


def test_the_callback_evaluates_the_likelihood_of_the_data_not_of_its_logarithm(tmp_path: Path) -> None:
    rows = SupervisedBatch(torch.full((8, 1), 1.5), torch.zeros(8))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        callbacks=[LikelihoodEvaluation(probes=None)], use_distributed_sampler=False,
    )  # fmt: skip
    (result,) = trainer.test(exact_model(0.1, 0.3), TensorDataModule(test=rows), verbose=False)
    assert result["test/nll"] == pytest.approx(0.638814, abs=2e-3)


def test_scores_are_gradients_of_the_log_density() -> None:
    model = exact_model(0.1, 0.3, GeometricBrownian(mu=0.7, volatility=0.6), shift=0.2)
    t, x = torch.tensor([0.3, 0.9]), torch.tensor([[1.0], [2.5]], requires_grad=True)
    mean, std = 0.1 + (0.7 - 0.18) * t, (0.09 + 0.36 * t).sqrt()
    log_density = torch.distributions.LogNormal(mean[:, None], std[:, None]).log_prob(x + 0.2)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    x = x.detach()
    torch.testing.assert_close(model.stein_score(x, t), score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.hyvarinen_score(x, t), (x + 0.2) * score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "hyvarinen", "stein"])
@pytest.mark.parametrize("network_input", ["log", "x"])
def test_every_prediction_learns_log_normal_data(prediction: str, network_input: str) -> None:
    torch.manual_seed(0)
    process = GeometricBrownian(t_min=0.05)
    model = MultiplicativeDiffusion(
        TimeMLP([1], width=32, blocks=1),
        [1],
        process,
        PositiveData(0.0, None, "scalar"),
        prediction=prediction,
        network_input=network_input,
        optimizer=lambda params: torch.optim.Adam(params, lr=3e-3),
        seed=0,
    )
    x = lognormal_rows(2048, 0.5, 0.3)
    model.fit_moments([(x,)])
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
    samples = model.sample(2000, solver="dpmpp_2m", steps=20, grid="karras", generator=torch.Generator().manual_seed(1))
    assert float(samples.log().mean()) == pytest.approx(0.5, abs=0.06)
    assert float(samples.log().std()) == pytest.approx(0.3, abs=0.1)  # the noise to start from has 0.85


def test_class_averages_are_a_start() -> None:
    model = exact_model(0.5, 0.1)
    averages = torch.full((4000, 1), 1.5)
    start = model.diffuse(averages, generator=torch.Generator().manual_seed(0))
    assert float(start.log().mean()) == pytest.approx(math.log(1.5), abs=0.05)
    assert float(start.log().std()) == pytest.approx(0.8, rel=0.05)
    x = model.sample(4000, solver=UMS(), steps=200, x_init=start)
    assert float(x.log().mean()) == pytest.approx(0.5, abs=0.02)


def test_a_row_with_its_own_generator_does_not_depend_on_the_others() -> None:
    model = exact_model(0.5, 0.1)
    together = model.sample(3, solver=DLS(), steps=5, generator=[torch.Generator().manual_seed(i) for i in range(3)])
    alone = model.sample(1, solver=DLS(), steps=5, generator=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(together[2:], alone)


def test_what_is_not_positive_is_refused_with_the_remedies() -> None:
    model = MultiplicativeDiffusion(TimeMLP([1], width=8), [1], data=PositiveData(0.0, None))
    message = "x with shift=0 must be > 0 everywhere, got a minimum of 0: give PositiveData a larger shift, or drop"
    with pytest.raises(ValueError, match=message):
        model.fit_moments([(torch.tensor([[1.0], [0.0]]),)])
    with pytest.raises(ValueError, match=message):
        model.loss(torch.tensor([[1.0], [0.0]]))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1\), got \(3, 2\)"):
        model.fit_moments([(torch.ones(3, 2),)])
    with pytest.raises(ValueError, match="batches must hold at least one, got none"):
        model.fit_moments([])
    for use in (lambda: model.sample(2, steps=2), lambda: model.log_prob(torch.ones(1, 1), steps=1)):
        with pytest.warns(UserWarning, match="the moments of the data are not known, so samples start from a wrong"):
            use()
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        model.sample(0)
    with pytest.raises(ValueError, match=r"shape must be that of the model, \(1,\), got \(2,\)"):
        model.sample(1, shape=(2,))


def test_the_default_sampler_is_that_of_the_paper_without_annealing() -> None:
    model = exact_model(0.5, 0.1, GeometricBrownian())
    assert model.sampling == Sampling(DLS(), steps=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(2, steps=10)
