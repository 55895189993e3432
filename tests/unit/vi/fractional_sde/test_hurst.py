"""The Hurst index of paths whose index is known."""

import warnings

import numpy as np
import pytest
import torch

from lit_methods.vi import HurstFit, fbm_covariance, fit_hurst, sample_fbm


def paths(hurst: float, n: int, m: int, seed: int = 0) -> np.ndarray:
    return sample_fbm(torch.arange(n), hurst, m, generator=torch.Generator().manual_seed(seed)).numpy()


def log_density(path: np.ndarray, times: np.ndarray, found: HurstFit) -> float:
    """Of the increments, by the dense covariance of levels and noise."""
    t = torch.from_numpy(times - times[0])
    level = found.scale**2 * fbm_covariance(t[:, None], t, found.hurst, "I", normalize=True)
    level = level + found.obs_std**2 * torch.eye(len(t))
    covariance = level.diff(dim=0).diff(dim=1)
    steps = torch.from_numpy(np.diff(path) - found.drift * np.diff(times))
    return torch.distributions.MultivariateNormal(torch.zeros(len(steps)).double(), covariance).log_prob(steps).item()


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_fast_recursion_is_the_dense_density(noise: float) -> None:
    path = paths(0.3, 310, 1)[0]
    found = fit_hurst(path, obs_std=noise)
    assert found.log_prob == pytest.approx(log_density(path, np.arange(310.0), found), abs=1e-6)


@pytest.mark.parametrize("hurst", [0.2, 0.5, 0.8])
def test_the_interval_covers_and_the_error_is_as_promised(hurst: float) -> None:
    fits = [fit_hurst(path) for path in paths(hurst, 120, 20)]
    estimates = np.array([fit.hurst for fit in fits])
    promised = np.mean([fit.std_error for fit in fits])
    assert sum(fit.low < hurst < fit.high for fit in fits) >= 17
    assert abs(estimates.mean() - hurst) < 3.5 * promised / 20**0.5
    assert 0.5 < estimates.std() / promised < 1.7
    assert 0.03 < promised < 0.075


def test_exact_is_more_precise_than_dfa_and_rescaled_range() -> None:
    errors = {}
    for method in ("exact", "dfa", "rs"):
        fits = [fit_hurst(path, method=method) for path in paths(0.7, 200, 12)]
        errors[method] = np.sqrt(np.mean([(fit.hurst - 0.7) ** 2 for fit in fits]))
        assert sum(fit.low < 0.7 < fit.high for fit in fits) >= 8
    assert errors["exact"] < errors["dfa"] < 0.2
    assert errors["exact"] < errors["rs"] < 0.2


@pytest.mark.parametrize("method", ["exact", "dfa", "rs"])
def test_white_increments_are_a_half_and_the_answer_is_the_same_again(method: str) -> None:
    walk = np.random.default_rng(0).normal(size=400).cumsum()
    found = fit_hurst(walk, method=method)
    assert found.low < 0.5 < found.high
    assert found.std_error < 0.09
    again = fit_hurst(walk, method=method)
    assert (found.hurst, found.low, found.high) == (again.hurst, again.low, again.high)


def test_the_fit_is_a_maximum_of_the_exact_density() -> None:
    path = paths(0.3, 60, 1)[0]
    times = 0.01 * np.arange(60.0)
    found = fit_hurst(path, times, drift=True)
    best = log_density(path, times, found)
    assert best == pytest.approx(found.log_prob, abs=1e-6)
    for change in ({"hurst": found.hurst + 0.02}, {"hurst": found.hurst - 0.02}, {"scale": found.scale * 1.1}):
        assert log_density(path, times, HurstFit(**vars(found) | change)) < best
    for factor in (0.9, 1.1):
        assert log_density(path, times, HurstFit(**vars(found) | {"drift": found.drift * factor})) < best


def test_missing_values_and_noise() -> None:
    rng = np.random.default_rng(0)
    times = np.sort(rng.random(150))
    path = (
        3
        * sample_fbm(torch.from_numpy(times), 0.7, normalize=True, generator=torch.Generator().manual_seed(0))[
            0
        ].numpy()
    )
    noisy = path + 0.1 * rng.normal(size=150)
    noisy[rng.random(150) < 0.3] = np.nan
    given, fitted = (fit_hurst(noisy, times, obs_std=std) for std in (0.1, None))
    seen = ~np.isnan(noisy)
    for found in (given, fitted):
        assert found.low < 0.7 < found.high
        assert found.log_prob == pytest.approx(log_density(noisy[seen], times[seen], found), abs=1e-6)
    assert fitted.log_prob >= given.log_prob
    assert fitted.obs_std == pytest.approx(0.1, rel=0.5)
    assert fit_hurst(noisy, times).hurst < given.low  # unmodelled noise looks rough
    assert fit_hurst(noisy[seen], times[seen], obs_std=0.1).hurst == given.hurst


def test_equal_spacing_is_a_special_case() -> None:
    path = paths(0.4, 80, 1)[0] + 0.3 * np.random.default_rng(0).normal(size=80)
    times = np.arange(80.0)
    uneven = times.copy()
    uneven[-1] += 1e-4
    fast, dense = fit_hurst(path, times, obs_std=0.3), fit_hurst(path, uneven, obs_std=0.3)
    assert fast.hurst == pytest.approx(dense.hurst, abs=1e-3)
    assert fast.log_prob == pytest.approx(dense.log_prob, abs=1e-2)


def test_several_paths_share_the_index() -> None:
    many = paths(0.6, 80, 8)
    together = fit_hurst(many)
    assert together.std_error < 0.6 * fit_hurst(many[0]).std_error
    assert together.low < 0.6 < together.high


def test_units_do_not_matter() -> None:
    path = paths(0.3, 100, 1)[0]
    plain, other = fit_hurst(path, obs_std=None), fit_hurst(1e3 * path, 1e-4 * np.arange(100), obs_std=None)
    assert plain.hurst == pytest.approx(other.hurst, abs=1e-3)
    assert other.scale == pytest.approx(1e3 * plain.scale / 1e-4**plain.hurst, rel=0.02)


def test_what_is_no_path_warns() -> None:
    noise = np.random.default_rng(0).normal(size=300)
    with pytest.warns(UserWarning, match="bound 0.01.*increments of a path"):
        fit_hurst(np.diff(noise))
    with pytest.warns(UserWarning, match="bound 0.99.*cumulated sum of a path"):
        fit_hurst(noise.cumsum().cumsum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_hurst(noise.cumsum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "hurst"}, "method must be 'exact', 'dfa' or 'rs', got 'hurst'"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
        ({"obs_std": -1.0}, "obs_std must be >= 0"),
        ({"series": np.zeros((2, 2, 2))}, r"series must have shape \(n,\) or \(m, n\)"),
        ({"series": np.ones(9)}, "series must change, got 1 throughout row 0"),
        ({"series": np.arange(7.0)}, "at least 8 observed values, got 7 in row 0"),
        ({"series": np.full(9, np.inf)}, "series must be finite"),
        ({"times": np.arange(8.0)}, "times must hold one time for each value, got 8 for 9"),
        ({"times": np.arange(9.0)[::-1].copy()}, "times must increase strictly"),
        ({"method": "dfa", "drift": True}, "method must be 'exact' for unequal spacing"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_hurst(**{"series": np.arange(9.0) ** 2} | arguments)
