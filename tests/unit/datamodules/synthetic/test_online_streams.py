import math

import pytest
import torch

from lit_methods.datamodules import DriftingDigitsDataModule, SEADataModule
from lit_methods.metrics.online_losses import sample_gradients, sample_losses

KINDS = ("iid", "drift", "abrupt", "adversarial", "corrupted")


def make(**arguments):
    return SEADataModule(**({"dim": 4, "rounds": 50, "dtype": "float64"} | arguments))


@pytest.mark.parametrize("loss", ["linear", "quadratic", "least_squares", "logistic", "hinge", "abs"])
@pytest.mark.parametrize("kind", KINDS)
def test_stream_is_a_function_of_seed_epoch_and_rank(kind, loss):
    first, again = (make(kind=kind, loss=loss).stream(1, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.features.shape == (50, 1, 4)
    assert first.targets.shape == (50, 1)
    assert first.comparator.shape == (50, 4)
    assert float(first.comparator.norm(dim=1).max()) <= 1 + 1e-12
    other_rank = make(kind=kind, loss=loss).stream(1, 3)
    assert torch.equal(other_rank.comparator, first.comparator), "ranks see the same drift"
    assert not torch.equal(other_rank.features, first.features), "ranks draw their own losses"
    if loss in ("logistic", "hinge"):
        assert set(first.targets.flatten().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("loss", ["linear", "quadratic"])
def test_noise_and_drift_of_known_gradients(loss):
    """On every path the sampled gradient is the expected one plus noise on a sphere."""
    for kind in KINDS:
        data = make(kind=kind, loss=loss, noise=0.3, radius=2.0)
        rounds, x = data.stream(), torch.zeros(4, dtype=torch.float64)
        expected = data.signal() if loss == "linear" else -data.signal()
        noise = sample_gradients(loss, x, rounds.features, rounds.targets)[:, 0] - expected
        torch.testing.assert_close(noise.norm(dim=1), torch.full((50,), 0.3, dtype=torch.float64))
        assert data.sigma2 == pytest.approx(50 * 0.09)
        first = 1.0 if loss == "linear" else 3.0**2  # x in the ball of radius 2, theta of norm 1
        assert data.Sigma2 == pytest.approx(first + float(expected.diff(dim=0).square().sum()))
        assert data.path_length == pytest.approx(float(rounds.comparator.diff(dim=0).norm(dim=1).sum()))


def test_least_squares_variance_is_exact():
    """Monte Carlo at the worst point of the ball, opposite to theta."""
    data = make(loss="least_squares", rounds=200_000, noise=0.4)
    rounds, theta = data.stream(), data.signal()[0]
    worst = -theta / theta.norm()
    gradients = sample_gradients("least_squares", worst, rounds.features, rounds.targets)[:, 0]
    variance = float(gradients.var(0, unbiased=False).sum())
    assert variance == pytest.approx(data.sigma2 / 200_000, rel=0.02)
    torch.testing.assert_close(gradients.mean(0), (worst - theta) / 4, rtol=0, atol=0.01)
    assert data.Sigma2 == pytest.approx((1.5 / 4) ** 2)


def test_samples_of_a_round_divide_the_variance():
    assert make(samples_per_round=5).sigma2 == pytest.approx(make().sigma2 / 5)
    assert make(samples_per_round=5).stream().features.shape == (50, 5, 4)


@pytest.mark.parametrize("loss", ["linear", "quadratic", "least_squares"])
def test_comparator_minimises_the_expected_loss(loss):
    data = make(kind="abrupt", loss=loss, noise=0.0, stages=1, rounds=2000)
    rounds = data.stream()
    best = sample_losses(loss, rounds.comparator[:, None], rounds.features, rounds.targets).sum()
    for point in torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        other = sample_losses(loss, point / point.norm(), rounds.features, rounds.targets).sum()
        assert best <= other + 1e-9


def test_kinds_move_as_they_say():
    still = make(kind="iid").signal()
    assert torch.equal(still, still[:1].expand(50, 4))
    turning = make(kind="drift", drift=2 * math.pi / 25).signal()
    torch.testing.assert_close(turning[25:], turning[:25])
    assert len(make(kind="abrupt", stages=5).signal().unique(dim=0)) == 5
    signs = make(kind="adversarial", rounds=4000).signal() @ still[0]
    assert abs(float(signs.mean())) < 0.05
    share = float((make(kind="corrupted", corruption=0.2, rounds=4000).signal() @ still[0] < 0).double().mean())
    assert share == pytest.approx(0.2, abs=0.02)


def test_random_order_permutes_one_pool():
    data = make(kind="random_order", noise=0.5)
    first, second = (data.stream(epoch).features[:, 0] for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist())
    remaining = [first[t:] for t in range(50)]
    sigma2 = sum(float(rest.var(0, unbiased=False).sum()) for rest in remaining)
    means = torch.stack([rest.mean(0) for rest in remaining])
    assert data.sigma2 == pytest.approx(sigma2)
    assert data.Sigma2 == pytest.approx(float(means[0].square().sum() + means.diff(dim=0).square().sum()))


def test_constants_without_closed_form_are_refused():
    with pytest.raises(ValueError, match="sigma2 has no closed form for loss='hinge'"):
        _ = make(loss="hinge").sigma2
    with pytest.raises(ValueError, match="Sigma2 has no closed form"):
        _ = make(loss="abs").Sigma2


def test_digits_turn():
    data = DriftingDigitsDataModule(rounds=200, period=100)
    rounds = data.stream()
    assert rounds.features.shape == (200, 1, 65)
    assert float(rounds.features.norm(dim=-1).max()) <= 1 + 1e-6
    assert set(rounds.targets.flatten().tolist()) == {-1.0, 1.0}
    still = DriftingDigitsDataModule(rounds=200, max_angle=0.0).stream()
    assert torch.equal(still.targets, rounds.targets)
    assert not torch.equal(still.features, rounds.features)
