"""The module's bound against exact evidences, its holes, its forecasts."""

import math

import pytest
import torch
from torch import Tensor, nn

from lit_methods.batches import PathBatch
from lit_methods.vi import (
    ControlMLP,
    Encoding,
    FractionalSDE,
    FractionalSDEModule,
    LinearDrift,
    MarkovFBM,
    NoisePosterior,
    SeriesEncoder,
)
from tests.unit.vi.fractional_sde.test_sde import BestControl, Constant, draw


class Fixed(nn.Module):
    """An encoder that says the same of every series."""

    def __init__(self, mean: float, log_variance: float) -> None:
        super().__init__()
        self.mean, self.log_variance = mean, log_variance

    def forward(self, times: Tensor, values: Tensor, mask: Tensor) -> Encoding:
        one = torch.ones(len(mask), 1)
        return Encoding(self.mean * one, self.log_variance * one, torch.zeros(*mask.shape, 0), None)


def bridge(o: float = 0.7, rows: int = 2000, end: float = 2.0) -> PathBatch:
    values = torch.tensor([0.0, o]).view(1, 2, 1).expand(rows, -1, -1)
    return PathBatch(torch.tensor([0.0, end]), values, torch.tensor([[False, True]]).expand(rows, -1))


def linear(noise: MarkovFBM, control: nn.Module, **more) -> FractionalSDE:
    return FractionalSDE(LinearDrift(), 1.0, control, noise, 1, **{"dt": 0.01} | more)


def bound(module: FractionalSDEModule, batch: PathBatch) -> tuple[float, float]:
    with torch.no_grad():
        found = module.terms(batch, draw())
    total = -found["nll"] - sum(value for name, value in found.items() if name.startswith("kl_"))
    return total.mean().item(), (total.std() / len(total) ** 0.5).item()


def test_the_bound_meets_the_evidence_at_the_exact_control() -> None:
    noise = MarkovFBM(time_horizon=6.0, hurst=0.7)
    module = FractionalSDEModule(linear(noise, BestControl(noise, 0.7, 2.0, 0.1), dt=0.0025), obs_std=0.1, seed=0)
    module.double()  # the exact control divides by the variance that is left
    evidence = noise.log_prob(torch.tensor([2.0]), torch.tensor([0.7]), 0.1).item()
    found, error = bound(module, bridge())
    assert found == pytest.approx(evidence, abs=4 * error + 0.02)


def test_a_posterior_of_the_memory_closes_the_gap_of_kind_i() -> None:
    """The exact posterior of Y(0) is Gaussian: in white coordinates a shift and a shrinking along one direction."""
    noise = MarkovFBM(time_horizon=6.0, kind="I", hurst=0.7)
    o, std, end = 3.0, 0.1, torch.tensor(2.0)
    evidence = noise.log_prob(end[None], torch.tensor([o]), std).item()
    c = noise.weights().detach() * torch.expm1(-noise.speeds * 2.0)
    factor = torch.linalg.cholesky(noise.initial_covariance())
    white = factor.T @ c
    rest = noise.covariance(end, end).detach() - white @ white + std**2
    covariance = torch.linalg.inv(torch.eye(5) + torch.outer(white, white) / rest)
    lower = torch.linalg.cholesky(covariance)
    posterior = NoisePosterior(1, 5).double()
    entries = torch.where(torch.eye(5).bool(), lower.diagonal().log().diag(), lower)
    rows, columns = torch.tril_indices(5, 5)
    with torch.no_grad():
        posterior.free.copy_(torch.cat([covariance @ white * o / rest, entries[rows, columns]]))
    control = BestControl(noise, o, 2.0, std)
    loose, tight = (
        FractionalSDEModule(linear(noise, control, dt=0.0025), y0_posterior=y0, obs_std=std, seed=0).double()
        for y0 in (None, posterior)
    )
    found, error = bound(tight, bridge(o))
    assert found == pytest.approx(evidence, abs=4 * error + 0.02)
    found, error = bound(loose, bridge(o))
    assert found + 4 * error < evidence


def test_the_divergence_of_the_memory_is_that_of_gaussians() -> None:
    torch.manual_seed(0)
    posterior = NoisePosterior(2, 3, context_dim=4)
    for p in posterior.parameters():
        nn.init.normal_(p, std=0.3)
    factor = torch.linalg.cholesky(MarkovFBM(3, kind="I").initial_covariance())
    context, many = torch.randn(1, 4), 200_000
    noise = torch.randn(many, 2, 3, generator=draw())
    y0, kl = posterior(many, context.expand(many, -1), noise, factor)
    prior = torch.distributions.MultivariateNormal(torch.zeros(3), scale_tril=factor.float())
    expected = 0.0
    for d in range(2):
        moments = torch.distributions.MultivariateNormal(y0[:, d].mean(0), y0[:, d].T.cov())
        expected += torch.distributions.kl_divergence(moments, prior).item()
    assert kl[0].item() == pytest.approx(expected, rel=0.02)
    start = NoisePosterior(1, 3)
    y0, kl = start(2, None, noise[:2, :1], factor)
    assert not kl.any()
    torch.testing.assert_close(y0, noise[:2, :1] @ factor.T.float())


def test_the_first_state_has_its_divergence() -> None:
    module = FractionalSDEModule(linear(MarkovFBM(kind="white"), Constant(0.0)), Fixed(0.5, -1.0), obs_std=0.3, seed=0)
    with torch.no_grad():
        module.prior_mean.fill_(-0.2)
        module.prior_log_variance.fill_(0.4)
    q, p = (torch.distributions.Normal(m, math.exp(v / 2)) for m, v in ((0.5, -1.0), (-0.2, 0.4)))
    found = module.terms(bridge(rows=3), draw())
    torch.testing.assert_close(found["kl_x0"], torch.distributions.kl_divergence(q, p).expand(3))
    starts = module.sample_prior(20_000, torch.tensor([0.0]), draw())
    assert starts.mean().item() == pytest.approx(-0.2, abs=0.05)
    assert starts.var().item() == pytest.approx(math.exp(0.4), rel=0.05)


def test_the_likelihood_is_gaussian_and_counts_what_was_seen() -> None:
    module = FractionalSDEModule(linear(MarkovFBM(kind="white"), Constant(0.0)), obs_std=0.3, x0=0.5, seed=0)
    values = torch.tensor([[[0.1], [0.2], [math.nan]], [[math.nan], [0.4], [0.7]]])
    batch = PathBatch(torch.tensor([0.0, 0.5, 1.0]), values, ~values[..., 0].isnan())
    found = module.terms(batch, draw())
    x = module.sde(torch.full((2, 1), 0.5), batch.times, generator=draw()).x
    assert (x[:, 0] == 0.5).all()
    density = torch.distributions.Normal(x, 0.3).log_prob(values.nan_to_num())
    torch.testing.assert_close(found["nll"], -torch.where(batch.mask[..., None], density, 0.0).sum((1, 2)))
    errors = torch.where(batch.mask[..., None], (x - values.nan_to_num()).square(), 0.0).sum((1, 2))
    torch.testing.assert_close(found["mse"], errors / 2)


def series(rows: int = 4) -> PathBatch:
    values = torch.randn(rows, 5, 1, generator=draw())
    mask = torch.rand(rows, 5, generator=draw()) > 0.4
    return PathBatch(torch.tensor([0.0, 0.2, 0.3, 0.7, 1.0]), torch.where(mask[..., None], values, math.nan), mask)


def latent(**more) -> FractionalSDEModule:
    torch.manual_seed(0)
    sde = FractionalSDE(LinearDrift(1.0), 1.0, ControlMLP(1, 5, [8], 4), MarkovFBM(normalize=True), 1, dt=0.02)
    nn.init.normal_(sde.control.layers[-1].weight)
    return FractionalSDEModule(sde, SeriesEncoder(1, 1, 4, 8), seed=0, **more)


def test_holes_give_finite_losses_and_gradients_and_change_nothing() -> None:
    module, batch = latent(obs_std=None), series()
    found = module.terms(batch, draw())
    sum(value.sum() for name, value in found.items()).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    filled = batch._replace(values=torch.where(batch.mask[..., None], batch.values, 1e6))
    for a, b in zip(found.values(), module.terms(filled, draw()).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_prediction_is_a_mean_over_paths() -> None:
    module, batch = latent(num_paths=64), series(2)
    mean, std = module.predict_step(batch, 0)
    assert mean.shape == std.shape == (2, 5, 1)
    assert (std[:, -1] > 0).all()
    again, _ = module.predict_step(batch, 0)
    assert torch.equal(mean, again)
    assert not torch.equal(mean, module.predict_step(batch, 1)[0])


def test_a_forecast_keeps_the_noise_s_memory() -> None:
    """Of a rough path that is known to be high, the mean falls back; without memory it would stay."""
    noise = MarkovFBM(time_horizon=4.0, hurst=0.2, normalize=True)
    module = FractionalSDEModule(linear(noise, BestControl(noise, 3.0, 1.0, 0.01)), obs_std=0.01, seed=0).double()
    batch, later = bridge(3.0, rows=1, end=1.0), torch.tensor([1.05, 2.0])
    paths = module.forecast(batch, later, num_paths=3000, generator=draw())
    assert paths.shape == (3000, 1, 2, 1)
    times = torch.tensor([1.0, 1.05, 2.0]).double()
    covariance = noise.covariance(times[:, None], times).detach()
    expected = covariance[0, 1:] / covariance[0, 0] * 3.0
    assert expected[1] < 2.0
    variance = covariance.diag()[1:] - covariance[0, 1:] ** 2 / covariance[0, 0]
    error = (variance / 3000).sqrt()
    assert ((paths.mean((0, 1, 3)) - expected).abs() < 4 * error + 0.12).all()


def test_a_forecast_says_what_is_wrong() -> None:
    module, batch = latent(), series()
    with pytest.raises(ValueError, match="times must be later than the last observation's 1, got 1"):
        module.forecast(batch, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="num_paths must be >= 1, got 0"):
        module.forecast(batch, torch.tensor([2.0]), num_paths=0)
    with pytest.warns(UserWarning, match="times end 2 after the first.*time_horizon of 1"):
        module.forecast(batch, torch.tensor([2.0]), num_paths=1)


def test_losses_log_and_depend_on_seed_and_step() -> None:
    logged: dict[str, float] = {}
    module = latent(kl_weight=0.5, obs_std=None)
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign]
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    first, second = (module.training_step(series(), 0).item() for _ in range(2))
    assert first != second
    divergences = logged["train/kl_path"] + logged["train/kl_x0"]
    assert second == pytest.approx((logged["train/nll"] + 0.5 * divergences).item(), rel=1e-5)
    assert logged["train/elbo"].item() == pytest.approx(-(logged["train/nll"] + divergences).item(), rel=1e-5)
    assert logged["train/hurst"] == 0.5
    assert logged["train/obs_std"] == 1
    checkpoint: dict = {}
    module.on_save_checkpoint(checkpoint)
    resumed = latent(kl_weight=0.5, obs_std=None)
    resumed.log_dict = resumed.log = lambda *_, **__: None  # type: ignore[method-assign]
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.training_step(series(), 0).item() == module.training_step(series(), 0).item()


@pytest.mark.slow
def test_training_finds_the_bridge() -> None:
    """Kind II, H = 0.7: the bound comes within 0.3 nats of the evidence in 1500 steps."""
    torch.manual_seed(0)
    noise = MarkovFBM(time_horizon=2.0, hurst=0.7)
    module = FractionalSDEModule(linear(noise, ControlMLP(1, 5), dt=0.02), obs_std=0.1, seed=0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    batch = bridge(0.0, 64)
    for step in range(1500):
        optimizer.zero_grad()
        found = module.terms(batch, draw(step))
        (found["nll"] + found["kl_path"]).mean().backward()
        optimizer.step()
    evidence = noise.log_prob(torch.tensor([2.0]), torch.tensor([0.0]), 0.1).item()
    found, error = bound(module, bridge(0.0))
    assert evidence - 0.3 < found < evidence + 4 * error


def test_bad_batches_are_named() -> None:
    module, batch = latent(), series()
    with pytest.raises(ValueError, match="values must be finite where mask is True"):
        module(batch._replace(mask=torch.ones_like(batch.mask)))
    with pytest.raises(ValueError, match=r"times must have shape \(T,\).*mask"):
        module(batch._replace(times=batch.times.expand(4, -1)))
    plain = FractionalSDEModule(linear(MarkovFBM(), Constant(0.0)), seed=0)
    with pytest.raises(ValueError, match=r"values must have the decoder's shape \(4, 5, 1\), got \(4, 5, 2\)"):
        plain.terms(batch._replace(values=torch.zeros(4, 5, 2)))
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        module.sample_prior(0, batch.times)
