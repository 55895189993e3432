"""MA-fBM: its weights against 60-digit arithmetic, its covariance, paths and likelihood against closed forms."""

import math

import mpmath
import pytest
import torch

from lit_methods.vi import HurstCurve, MarkovFBM, fbm_covariance, ou_speeds, sample_fbm
from lit_methods.vi.fractional_sde.weights import OptimalWeights, normal_matrix, right_side

TIMES = torch.linspace(0.05, 2, 40, dtype=torch.float64)


def exact_problem(speeds: list[float], horizon: float, hurst: float, kind: str) -> tuple[mpmath.matrix, mpmath.matrix]:
    """``A`` and ``b`` as the card writes them, in 60 digits."""
    mpmath.mp.dps = 60
    a, t, g = mpmath.mpf(hurst) + mpmath.mpf(1) / 2, mpmath.mpf(horizon), [mpmath.mpf(x) for x in speeds]
    matrix, b = mpmath.matrix(len(g), len(g)), mpmath.matrix(len(g), 1)
    for i, x in enumerate(g):
        for j, y in enumerate(g):
            both = x + y
            if kind == "I":
                matrix[i, j] = (2 * t + mpmath.expm1(-x * t) / x + mpmath.expm1(-y * t) / y) / both
            else:
                matrix[i, j] = (t + mpmath.expm1(-both * t) / both) / both
        lower = mpmath.gammainc(a, 0, x * t, regularized=True)
        if kind == "I":
            upper = mpmath.exp(-x * t) - mpmath.gammainc(a, x * t, regularized=True) * mpmath.exp(x * t)
            b[i] = 2 * t / x**a - t**a / (x * mpmath.gamma(a + 1)) + upper / x ** (a + 1)
        else:
            b[i] = t / x**a * lower - a / x ** (a + 1) * mpmath.gammainc(a + 1, 0, x * t, regularized=True)
    return matrix, b


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize(
    ("num_ou", "gamma_max", "horizon", "tolerance"),
    [(5, 20.0, 1.0, 1e-8), (7, 20.0, 6.0, 1e-9), (5, 200.0, 10.0, 1e-11)],
)
def test_weights_agree_with_high_precision(
    kind: str, num_ou: int, gamma_max: float, horizon: float, tolerance: float
) -> None:
    speeds = ou_speeds(num_ou, gamma_max)
    weights = OptimalWeights(speeds, horizon, kind, normalize=False)
    for hurst in (0.02, 0.3, 0.5, 0.98):
        exact = [float(x) for x in mpmath.lu_solve(*exact_problem(speeds.tolist(), horizon, hurst, kind))]
        found = weights(torch.tensor(hurst, dtype=torch.float64))
        assert (found - torch.tensor(exact, dtype=torch.float64)).abs().max() < tolerance * max(map(abs, exact))


def test_published_weights() -> None:
    expected = torch.tensor([44.0, -61.0, 21.0, -3.7, 2.7], dtype=torch.float64)
    torch.testing.assert_close(MarkovFBM(hurst=0.25).weights(), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("kind", "horizon", "num_ou", "errors"),
    [
        ("I", 1.0, 5, (0.307, 0.017, 0.098, 0.510)),
        ("II", 1.0, 5, (0.229, 0.0078, 1.3e-4, 5.9e-5)),
        ("I", 6.0, 7, (0.210, 0.015, 0.240, 0.681)),
        ("II", 6.0, 5, (0.168, 0.0030, 5.8e-5, 1.2e-4)),
    ],
)
def test_relative_errors_are_the_published_ones(
    kind: str, horizon: float, num_ou: int, errors: tuple[float, ...]
) -> None:
    for hurst, expected in zip((0.1, 0.3, 0.7, 0.9), errors, strict=True):
        noise = MarkovFBM(num_ou, 20.0, horizon, kind, hurst)
        power = horizon ** (2 * hurst + 1)
        variance = fbm_covariance(torch.ones(()), torch.ones(()), hurst, kind).item()
        whole = variance * power / (2 * hurst + 1)
        _, b = exact_problem(noise.speeds.tolist(), horizon, hurst, kind)
        explained = float(sum(w * float(x) for w, x in zip(noise.weights().tolist(), b, strict=True)))
        assert (whole - explained) / whole == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_the_weights_are_a_minimum(kind: str) -> None:
    z = ou_speeds(4, 20.0)
    matrix = normal_matrix(z, kind)
    assert torch.equal(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix)[0] > 0
    hurst = torch.tensor(0.3, dtype=torch.float64)
    b = torch.from_numpy(right_side(z.numpy(), hurst.numpy(), kind)) * z**-0.8
    w = OptimalWeights(z, 1.0, kind, normalize=False)(hurst)

    def cost(weights: torch.Tensor) -> torch.Tensor:
        return weights @ matrix @ weights - 2 * b @ weights

    for k in range(4):
        for sign in (-1e-3, 1e-3):
            moved = w.clone()
            moved[k] += sign
            assert cost(moved) > cost(w)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_weights_are_differentiable_and_self_similar(kind: str) -> None:
    hurst = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    speeds = ou_speeds(4, 20.0)
    plain = OptimalWeights(speeds, 1.0, kind, normalize=False)
    for normalize in (False, True):
        assert torch.autograd.gradcheck(OptimalWeights(speeds, 3.0, kind, normalize), (hurst,))
    slower = OptimalWeights(speeds / 4, 4.0, kind, normalize=False)(hurst)
    torch.testing.assert_close(slower, plain(hurst) * 4 ** (hurst[:, None] - 0.5), rtol=1e-8, atol=1e-8)


def test_conversions_do_not_round_the_weights() -> None:
    noise = MarkovFBM(hurst=0.3)
    exact = noise.weights()
    assert torch.equal(noise.bfloat16().weights(), exact)
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(noise.weights(), exact)
    assert not noise.state_dict()
    assert set(MarkovFBM().state_dict()) == {"logit"}


def test_a_half_is_brownian_motion() -> None:
    noise = MarkovFBM(hurst=0.5, kind="II")
    t = TIMES[TIMES < 1]
    assert (noise.covariance(t, t) / t - 1).abs().max() < 0.01
    white = MarkovFBM(kind="white")
    assert torch.equal(white.covariance(t[:, None], t), torch.minimum(t[:, None], t))
    assert (white.weights().tolist(), white.speeds.tolist(), white.hurst.item()) == ([1.0], [0.0], 0.5)


def test_covariance_is_near_that_of_fractional_noise() -> None:
    for kind, hurst, tolerance in (("II", 0.7, 0.01), ("II", 0.9, 0.01), ("I", 0.4, 0.05)):
        noise = MarkovFBM(7, 40.0, 2.0, kind, hurst)
        exact = fbm_covariance(TIMES[10:, None], TIMES[10:], hurst, kind)
        assert (noise.covariance(TIMES[10:, None], TIMES[10:]) / exact - 1).abs().max() < tolerance
    one = torch.tensor(1.0)
    for kind in ("I", "II"):
        assert MarkovFBM(7, 100.0, 1.0, kind, 0.4, normalize=True).covariance(one, one).item() == pytest.approx(
            1, abs=0.02
        )


@pytest.mark.parametrize("kind", ["I", "II", "white"])
def test_paths_have_the_covariance(kind: str) -> None:
    noise = MarkovFBM(time_horizon=2.0, kind=kind, hurst=0.5 if kind == "white" else 0.7)
    paths = noise.sample(TIMES[::4], (20_000,), torch.Generator().manual_seed(0))
    expected = noise.covariance(TIMES[::4, None], TIMES[::4])
    error = (expected.diag()[:, None] * expected.diag() + expected**2).div(len(paths)).sqrt()
    assert ((paths.T @ paths / len(paths) - expected).abs() < 4.5 * error).all()


def test_kind_i_covariance_is_that_of_the_bank() -> None:
    noise = MarkovFBM(3, kind="I", hurst=0.3)
    w, g, t, s = noise.weights(), noise.speeds, 1.3, 0.4
    sums = g[:, None] + g
    terms = torch.exp(-g * (t - s))[:, None] - torch.exp(-g * t)[:, None] - torch.exp(-g * s) + 1
    expected = (w[:, None] * w * terms / sums).sum()
    for pair in ((t, s), (s, t)):
        torch.testing.assert_close(noise.covariance(*map(torch.tensor, pair)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["I", "II", "white"])
def test_likelihoods_agree_by_both_ways(kind: str) -> None:
    noise = MarkovFBM(time_horizon=2.0, kind=kind, hurst=0.5 if kind == "white" else 0.3)
    uneven = TIMES[torch.tensor([0, 1, 4, 9, 10, 30, 39])]
    generator = torch.Generator().manual_seed(0)
    values = noise.sample(uneven, (2, 3), generator)
    mask = torch.rand(2, 3, 7, generator=generator) > 0.4
    for std in (0.1, 1.0):
        dense = noise.log_prob(uneven, values, std, method="dense")
        covariance = noise.covariance(uneven[:, None], uneven) + std**2 * torch.eye(7)
        by_hand = torch.distributions.MultivariateNormal(torch.zeros(7).double(), covariance).log_prob(values)
        torch.testing.assert_close(dense, by_hand)
        torch.testing.assert_close(noise.log_prob(uneven, values, std, method="kalman"), dense)
        holes = torch.where(mask, values, math.nan)
        masked = [noise.log_prob(uneven, holes, std, mask, method=method) for method in ("dense", "kalman")]
        torch.testing.assert_close(*masked)
        torch.testing.assert_close(masked[0][0, 0], noise.log_prob(uneven[mask[0, 0]], values[0, 0][mask[0, 0]], std))


def test_likelihood_has_gradients_through_holes() -> None:
    noise = MarkovFBM()
    values = torch.tensor([[0.1, math.nan, 0.3]])
    (-noise.log_prob(TIMES[:3], values, 0.1, ~values.isnan()).sum()).backward()
    assert noise.logit is not None
    assert noise.logit.grad is not None
    assert noise.logit.grad.isfinite()
    assert noise.logit.grad != 0


@pytest.mark.parametrize(("hurst", "estimate", "gain"), [(0.3, 0.296, 5.0), (0.5, 0.501, -1.0), (0.7, 0.689, 5.0)])
def test_the_likelihood_learns_the_index(hurst: float, estimate: float, gain: float) -> None:
    generator = torch.Generator().manual_seed(0)
    paths = sample_fbm(TIMES, hurst, 64, "II", generator=generator)
    paths = paths + 0.05 * torch.randn(paths.shape, generator=generator, dtype=torch.float64)
    noise = MarkovFBM(time_horizon=2.0)
    start = noise.log_prob(TIMES, paths, 0.05).mean()
    optimizer = torch.optim.LBFGS(noise.parameters(), max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -noise.log_prob(TIMES, paths, 0.05).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert noise.hurst.item() == pytest.approx(hurst, abs=0.03)
    assert noise.hurst.item() == pytest.approx(estimate, abs=0.02)
    learned = noise.log_prob(TIMES, paths, 0.05).mean()
    assert learned - start > gain
    exact = fbm_covariance(TIMES[:, None], TIMES, hurst, "II") + 0.05**2 * torch.eye(40)
    best = torch.distributions.MultivariateNormal(torch.zeros(40).double(), exact).log_prob(paths).mean()
    assert (learned - best).abs() < 0.15


def test_an_index_that_changes() -> None:
    curve = HurstCurve(3, time_horizon=2.0, start=0.3)
    torch.testing.assert_close(curve(torch.tensor([0.0, 0.7, 5.0])), torch.full((3,), 0.3).double())
    with torch.no_grad():
        curve.logits.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    ends = 0.02 + 0.96 * torch.sigmoid(curve.logits.double())
    torch.testing.assert_close(curve(torch.tensor([0.5])), ends[:2].mean()[None])
    noise = MarkovFBM(hurst=curve, time_horizon=2.0)
    assert noise.varies
    assert noise.weights(TIMES).shape == (40, 5)
    torch.testing.assert_close(
        noise.weights(torch.zeros(1))[0], MarkovFBM(hurst=ends[0].item(), time_horizon=2.0).weights()
    )
    constant = MarkovFBM(hurst=HurstCurve(2, start=0.3), time_horizon=2.0)
    fixed = MarkovFBM(hurst=0.3, time_horizon=2.0)
    paths = [n.sample(TIMES, (2,), torch.Generator().manual_seed(0)) for n in (constant, fixed)]
    torch.testing.assert_close(*paths)
    with pytest.raises(ValueError, match="times must be given where hurst depends on time"):
        noise.covariance(TIMES, TIMES)
    with pytest.raises(ValueError, match="hurst must map times"):
        MarkovFBM(hurst=torch.nn.Unflatten(0, (1, -1))).weights(TIMES)


def test_speeds() -> None:
    torch.testing.assert_close(ou_speeds(3, 20.0), torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64))
    torch.testing.assert_close(ou_speeds(2, 8.0, 2.0), torch.tensor([2.0, 8.0], dtype=torch.float64))
    assert ou_speeds(1).tolist() == [1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_ou": 0}, "num_ou must be >= 1, got 0"),
        ({"gamma_max": -1.0}, "gamma_max must be > 0"),
        ({"gamma_max": 0.5}, "gamma_max must be > 1 where gamma_min is not given, got 0.5"),
        ({"gamma_min": 30.0}, r"gamma_min must be in \(0, 20\), got 30.0"),
        ({"time_horizon": 0.0}, "time_horizon must be > 0"),
        ({"kind": "III"}, "kind must be 'I', 'II' or 'white', got 'III'"),
        ({"hurst": 0.0}, r"hurst must be in \(0, 1\), got 0.0"),
        ({"kind": "white", "hurst": 0.7}, "hurst must be None or 0.5 for kind 'white', got 0.7"),
        ({"time_horizon": 1e-3}, "gamma_min must suit the horizon.*gamma_max near 2e"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MarkovFBM(**arguments)


def test_bad_observations_are_named() -> None:
    noise = MarkovFBM(hurst=0.3)
    values = torch.zeros(2, 3)
    for arguments, message in (
        ({"times": torch.tensor([0.0, 1.0, 2.0])}, "times must be > 0"),
        ({"times": TIMES[:2]}, r"values must have shape \(..., 2\)"),
        ({"obs_std": -0.1}, "obs_std must be >= 0 and finite, got -0.1"),
        ({"values": values / 0}, "values must be finite"),
        ({"method": "magic"}, "method must be 'auto', 'dense' or 'kalman', got 'magic'"),
    ):
        with pytest.raises(ValueError, match=message):
            noise.log_prob(**{"times": TIMES[:3], "values": values} | arguments)
    with pytest.raises(ValueError, match="times must be >= 0, got -1"):
        noise.covariance(torch.tensor(-1.0), torch.tensor(1.0))
