"""Fractional Brownian motion: covariance by quadrature, circulant embedding, both samplers."""

import math

import pytest
import torch
from scipy.integrate import quad

from lit_methods.fractional_noise import circulant_row, fbm_covariance, sample_fbm, unit_variance

TIMES = torch.arange(1, 9, dtype=torch.float64) / 4


def one(t: float, s: float, hurst: float, kind: str, normalize: bool = False) -> float:
    return fbm_covariance(*torch.tensor([t, s], dtype=torch.float64), hurst, kind, normalize).item()


@pytest.mark.parametrize("hurst", [0.2, 0.5, 0.85])
def test_kind_ii_is_the_integral_of_its_kernel(hurst: float) -> None:
    a = hurst + 0.5
    # The kernel's singularity at u = s is a weight of the quadrature.
    value, _ = quad(lambda u: (1.3 - u) ** (a - 1), 0, 0.4, weight="alg", wvar=(0, a - 1), epsabs=1e-13)
    assert one(1.3, 0.4, hurst, "II") == pytest.approx(value / math.gamma(a) ** 2, rel=1e-9)
    assert one(0.4, 1.3, hurst, "II") == one(1.3, 0.4, hurst, "II")


@pytest.mark.parametrize("hurst", [0.2, 0.85])
def test_kind_i_adds_the_past(hurst: float) -> None:
    a = hurst + 0.5
    past, _ = quad(lambda u: ((1 + u) ** (a - 1) - u ** (a - 1)) ** 2, 0, math.inf, limit=500)
    assert one(1, 1, hurst, "I") == pytest.approx(past / math.gamma(a) ** 2 + one(1, 1, hurst, "II"), rel=1e-4)


def test_known_values() -> None:
    assert one(1, 0.5, 0.7, "I") == pytest.approx(0.497544, abs=1e-6)
    assert one(1, 0.5, 0.7, "II") == pytest.approx(0.407534, abs=1e-6)
    assert one(1, 0.5, 0.7, "I", True) == pytest.approx(0.5)
    assert one(1, 0.5, 0.7, "II", True) == pytest.approx(0.480991, abs=1e-6)
    for hurst, expected in ((0.1, 3.52), (0.3, 1.38), (0.6, 0.954), (0.9, 1.93)):
        assert unit_variance(hurst, "I") == pytest.approx(expected, rel=3e-3)
    assert one(2, 2, 0.7, "II") == pytest.approx(2**1.4 * unit_variance(0.7, "II"))
    assert one(0, 0, 0.3, "II") == one(0, 1, 0.3, "II") == 0


def test_correlation_of_neighbouring_increments() -> None:
    for kind, first, second, correlation in (("I", 1.0, 1.0, 0.319508), ("II", 0.847280, 0.932289, 0.256769)):
        variance = [one(t, t, 0.7, kind) for t in (1, 2)]
        both = one(2, 1, 0.7, kind)
        later = variance[1] + variance[0] - 2 * both
        assert (both - variance[0]) / math.sqrt(variance[0] * later) == pytest.approx(correlation, abs=1e-6)
        scale = 1 if kind == "II" else variance[0]
        assert (variance[0] / scale, later / scale) == pytest.approx((first, second), abs=1e-6)


def test_the_circulant_matrix_is_positive() -> None:
    row = circulant_row(10, 0.9)
    assert len(row) == 18
    assert torch.fft.rfft(row).real.min().item() == pytest.approx(0.1798, abs=1e-4)
    for hurst in (0.05, 0.5, 0.95):
        assert torch.fft.rfft(circulant_row(300, hurst)).real.min() > 0


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("method", ["auto", "cholesky"])
@pytest.mark.parametrize("hurst", [0.25, 0.9])
def test_paths_have_the_covariance(kind: str, method: str, hurst: float) -> None:
    paths = sample_fbm(TIMES, hurst, 20_000, kind, method=method, generator=torch.Generator().manual_seed(0))
    expected = fbm_covariance(TIMES[:, None], TIMES, hurst, kind)
    error = (expected.diag()[:, None] * expected.diag() + expected**2).div(len(paths)).sqrt()
    assert ((paths.T @ paths / len(paths) - expected).abs() < 4.5 * error).all()


def test_the_fast_sampler_is_taken_where_it_is_exact() -> None:
    def draw(times: torch.Tensor, method: str, kind: str = "I") -> torch.Tensor:
        return sample_fbm(times, 0.7, 3, kind, method=method, generator=torch.Generator().manual_seed(0))

    assert torch.equal(draw(TIMES, "auto"), draw(TIMES, "davies_harte"))
    from_zero = torch.cat([torch.zeros(1), TIMES])
    assert torch.equal(draw(from_zero, "auto"), torch.cat([torch.zeros(3, 1), draw(TIMES, "auto")], 1))
    uneven = torch.tensor([0.1, 0.2, 0.5]).double()
    assert torch.equal(draw(uneven, "auto"), draw(uneven, "cholesky"))
    for times, kind in ((uneven, "I"), (TIMES + 0.1, "I"), (TIMES, "II")):
        with pytest.raises(ValueError, match="method must be 'cholesky' or 'auto'"):
            draw(times, "davies_harte", kind)
    assert not draw(torch.zeros(1), "auto").any()
    assert draw(TIMES[:1], "auto").shape == (3, 1)


def test_normalized_paths_differ_by_their_scale() -> None:
    plain, normal = (
        sample_fbm(TIMES, 0.3, 2, normalize=n, generator=torch.Generator().manual_seed(1)) for n in (False, True)
    )
    torch.testing.assert_close(plain, normal * unit_variance(0.3, "I") ** 0.5)


def test_bad_arguments_are_named() -> None:
    for wrong, message in (
        ({"hurst": 1.0}, r"hurst must be in \(0, 1\), got 1.0"),
        ({"kind": "III"}, "kind must be 'I'"),
        ({"num_paths": 0}, "num_paths must be >= 1, got 0"),
        ({"method": "fft"}, "method must be"),
        ({"times": TIMES.flip(0)}, "times must increase strictly, got 2 and then 1.75"),
        ({"times": TIMES[None]}, r"times must have shape \(T,\).*mask"),
        ({"times": -TIMES.flip(0)}, "times must be >= 0, got -2"),
        ({"times": torch.tensor([1.0, math.nan])}, "times must be finite, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_fbm(**{"times": TIMES, "hurst": 0.5} | wrong)
    with pytest.raises(ValueError, match="times must be >= 0, got -1"):
        fbm_covariance(torch.tensor(-1.0), torch.tensor(1.0), 0.5)
