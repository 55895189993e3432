"""Geometric Brownian motion against its closed form, and the scores against autodiff."""

import math

import pytest
import torch
from torch import Tensor

from lit_methods.diffusion import GeometricBrownian, NoiseVariance, PowerTimes, convert, nonneg_score_matching_loss

PROCESSES = {
    "paper": GeometricBrownian(),
    "drift": GeometricBrownian(mu=-0.4, volatility=0.6),
    "functions": GeometricBrownian(mu=lambda t: 0.2 + 0 * t, volatility=lambda t: 0.3 + 0.5 * t),
    "channels": GeometricBrownian(mu=0.1, volatility=[0.5, 1.0, 0.8]),
}


@pytest.mark.parametrize("mu", [0.32, 1.0])
def test_mean_median_and_variance_are_those_of_geometric_brownian_motion(mu: float) -> None:
    process = GeometricBrownian(mu=mu, volatility=0.8)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1_000_000, 1, generator=generator, dtype=torch.float64)
    x = process.diffuse(torch.ones_like(noise), noise, torch.ones(len(noise), dtype=torch.float64))
    assert float(x.mean()) == pytest.approx(math.exp(mu), rel=4e-3)  # not exp(mu + sigma^2 / 2), nor the median
    assert float(x.median()) == pytest.approx(math.exp(mu - 0.32), rel=3e-3)
    assert float(x.log().var()) == pytest.approx(0.64, abs=3e-3)
    if mu == 0.32:
        assert float(x.mean()) == pytest.approx(1.37713, abs=5e-3)


@pytest.mark.parametrize("name", PROCESSES)
def test_noisy_data_has_the_closed_form(name: str) -> None:
    process = PROCESSES[name]
    x0, z = torch.rand(4, 3, 2, dtype=torch.float64) + 0.5, torch.randn(4, 3, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    at = t.view(4, 1, 1)
    variance, growth = {
        "paper": (0.64 * at, 0.32 * at),
        "drift": (0.36 * at, -0.4 * at),
        "functions": (((0.3 + 0.5 * at) ** 3 - 0.3**3) / 1.5, 0.2 * at),
        "channels": (torch.tensor([0.25, 1.0, 0.64]).view(1, 3, 1) * at, 0.1 * at),
    }[name]
    expected = x0 * (growth - variance / 2 + variance.sqrt() * z).exp()
    torch.testing.assert_close(process.diffuse(x0, z, t), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(process.from_log(process.to_log(x0, t), t), x0)


@pytest.mark.parametrize("name", PROCESSES)
def test_derivative_and_inverse_of_the_noise_level(name: str) -> None:
    process = PROCESSES[name]
    t = torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)
    h = 1e-4
    slope = (process.sigma(t + h) - process.sigma(t - h)) / (2 * h)
    torch.testing.assert_close(process.d_sigma(t), slope, rtol=1e-4, atol=0)
    torch.testing.assert_close(process.t_from_lam(process.lam(t)), t, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_hyvarinen_score_is_x_times_the_gradient_of_the_log_density(name: str) -> None:
    process = PROCESSES[name]
    x0, z = torch.rand(4, 3, 2, dtype=torch.float64) + 0.5, torch.randn(4, 3, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    x = process.diffuse(x0, z, t).requires_grad_()
    drift, scale = process.drift_and_scale(t, x)
    spread = scale * process.sigma(t).view(4, 1, 1)
    log_density = -x.log() - (x.log() - x0.log() - drift) ** 2 / (2 * spread**2)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(process.hyvarinen(z, t), x.detach() * score)
    torch.testing.assert_close(process.noise(process.hyvarinen(z, t), t), z)
    y = process.to_log(x.detach(), t)  # and the core's score, in y
    score_in_y = convert(z, y, t, "epsilon", "score", process)
    torch.testing.assert_close(score_in_y / scale - 1, x.detach() * score)


def test_the_authors_loss_is_zero_at_the_conditional_score_and_is_ours_weighted() -> None:
    process = GeometricBrownian(mu=0.5, volatility=0.7)
    x0, z = torch.rand(5, 3, dtype=torch.float64) + 0.5, torch.randn(5, 3, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    x, s2t = process.diffuse(x0, z, t), 0.49 * t[:, None]

    def residual(eps: Tensor) -> Tensor:  # of the authors' code, with the step of the noise
        h = process.hyvarinen(eps, t)
        return s2t * h + x.log() - x0.log() - 0.5 * t[:, None] + 1.5 * s2t

    assert float(residual(z).abs().max()) < 1e-12
    guess = torch.randn(5, 3, dtype=torch.float64)
    weight = NoiseVariance().in_space("epsilon", process, t)[:, None]
    torch.testing.assert_close(residual(guess) ** 2, weight * (guess - z) ** 2)


def test_the_mean_hyvarinen_score_is_minus_one() -> None:
    process = GeometricBrownian()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    t = torch.full((200_000,), 0.3, dtype=torch.float64)
    assert float(process.hyvarinen(z, t).mean()) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("probes", [None, 4])
def test_score_matching_without_noise_is_least_at_the_true_score(probes: int | None) -> None:
    k, theta = 3.0, 0.5
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.distributions.Gamma(k, 1 / theta).sample((20_000, 2)).double()

    def loss(a: float, b: float) -> float:
        return float(nonneg_score_matching_loss(lambda x: (a - 1) / x - b, x, probes, generator))

    true = loss(k, 1 / theta)
    # At the true score it is -E[(x s)^2] / 2 a dimension, and x s = k - 1 - x / theta has the second moment k + 1.
    assert true == pytest.approx(-(k + 1), rel=0.02)
    for a, b in ((k + 0.3, 2.0), (k - 0.3, 2.0), (k, 2.3), (k, 1.7)):
        error = 0.5 * float((a - k - x * (b - 2)).square().sum(1).mean())
        assert loss(a, b) - true == pytest.approx(error, rel=0.15)


def test_score_matching_takes_gradients_and_refuses_what_it_cannot_use() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    loss = nonneg_score_matching_loss(net, torch.rand(16, 2) + 0.1)
    loss.backward()
    assert all(p.grad is not None for p in net[0].parameters())
    with pytest.raises(ValueError, match="x must be > 0 everywhere, got a minimum of 0: shift the data"):
        nonneg_score_matching_loss(net, torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="num_probes must be >= 1 or None, got 0"):
        nonneg_score_matching_loss(net, torch.ones(1, 2), 0)


def test_power_times_prefer_little_noise() -> None:
    process = GeometricBrownian()
    t = PowerTimes(2.0).sample(10_000, process, torch.Generator().manual_seed(0), stratified=True)
    assert float(t.mean()) == pytest.approx(1 / 3, abs=2e-3)
    assert float(t.min()) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"volatility": 0.0}, "volatility must be > 0 and finite, got 0"),
        ({"volatility": [0.5, -1.0]}, "volatility must be > 0"),
        ({"volatility": lambda t: t - 0.5}, "volatility must be > 0"),
        ({"mu": math.inf}, "mu must be finite, got inf"),
    ],
)
def test_bad_rates_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeometricBrownian(**arguments)


def test_channels_must_match() -> None:
    with pytest.raises(ValueError, match="volatility must hold one number for each of 2 channels"):
        PROCESSES["channels"].to_log(torch.ones(1, 2), 0.0)
