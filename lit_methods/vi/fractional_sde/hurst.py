"""The Hurst index of a series, with a confidence interval."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.linalg import solve_triangular, toeplitz
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import chi2

from lit_methods.fractional_noise import check_times, fbm_covariance, increment_covariance, sample_fbm

LOW, HIGH = 0.01, 0.99
_DENSE_UP_TO = 4000
_LEVINSON_FROM = 300  # below, LAPACK's loop beats Python's
_REPLICATES = 100
_LOG_RATIOS = (-6.0, 6.0)


@dataclass(frozen=True)
class HurstFit:
    """What :func:`fit_hurst` found.

    Attributes:
        hurst: the Hurst index.
        low: lower end of its confidence interval.
        high: upper end.
        std_error: its standard error.
        scale: standard deviation of the path's increment over a time of 1.
        obs_std: standard deviation of the observation noise, as given or fitted.
        drift: fitted slope of the path, 0 without ``drift``.
        log_prob: log density of the increments in nats at the estimate; NaN for "dfa" and "rs".
    """

    hurst: float
    low: float
    high: float
    std_error: float
    scale: float
    obs_std: float
    drift: float
    log_prob: float


def fit_hurst(
    series: Any,
    times: Any = None,
    *,
    obs_std: float | None = 0.0,
    drift: bool = False,
    method: Literal["exact", "dfa", "rs"] = "exact",
    confidence: float = 0.95,
) -> HurstFit:
    """Estimate the Hurst index of a *path* (levels such as log prices or positions, not their increments).

    The model is fractional Brownian motion of unknown scale: a path of H = 1/2 has independent increments, a smoother
    one H > 1/2, a rougher one H < 1/2. If your data are the increments (a stationary noise), pass their cumulated sum.

    "exact" maximises the exact Gaussian likelihood and takes the interval from the likelihood ratio; it allows times
    that are not equally spaced, missing values and observation noise. "dfa" (detrended fluctuation analysis, Peng et
    al. 1994) and "rs" (rescaled range with the correction of Anis and Lloyd 1976) are there to compare: they are less
    precise, and biased for short or rough paths; their intervals, from 100 simulated paths, correct the bias, so that
    they may lie beside the estimate. The answer is the same at every call.

    Cost: O(n^2) time and O(n) memory for equally spaced series without missing values, else O(n^3) and O(n^2).

    Args:
        series: the path, ``(n,)``, or several that share the parameters, ``(m, n)``; NaN is a missing value.
        times: increasing times ``(n,)``; ``None``: 0, 1, 2, ...
        obs_std: standard deviation of independent noise on every level, >= 0; ``None``: fitted too.
        drift: fit a constant slope of the path as well.
        method: "exact", "dfa" or "rs".
        confidence: of the interval, in (0, 1).

    Returns:
        The estimate, in [0.01, 0.99]; a warning says when it ends at one of these.

    Raises:
        ValueError: an argument out of range; fewer than 8 observed values; a path that never changes; "dfa" or "rs"
            with unequal spacing, missing values, noise or drift.

    Example:
        >>> from lit_methods.vi import fit_hurst
        >>> path = np.random.default_rng(0).normal(size=1000).cumsum()
        >>> found = fit_hurst(path)
        >>> found.low < 0.5 < found.high
        True
    """
    if method not in ("exact", "dfa", "rs"):
        raise ValueError(f"method must be 'exact', 'dfa' or 'rs', got {method!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    if obs_std is not None and not 0 <= obs_std < math.inf:
        raise ValueError(f"obs_std must be >= 0 and finite, or None to fit it, got {obs_std}")
    paths = np.asarray(series, dtype=np.float64)
    if paths.ndim not in (1, 2):
        raise ValueError(f"series must have shape (n,) or (m, n), got {paths.shape}")
    paths = np.atleast_2d(paths)
    if np.isinf(paths).any():
        raise ValueError("series must be finite, or NaN where values are missing, got infinity")
    grid = np.arange(paths.shape[1], dtype=np.float64) if times is None else check_times(torch.as_tensor(times)).numpy()
    if len(grid) != paths.shape[1]:
        raise ValueError(f"times must hold one time for each value, got {len(grid)} for {paths.shape[1]}")
    for row, path in enumerate(paths):
        seen = path[~np.isnan(path)]
        if len(seen) < 8:
            raise ValueError(f"series must hold at least 8 observed values, got {len(seen)} in row {row}")
        if np.ptp(seen) == 0:
            raise ValueError(f"series must change, got {seen[0]:g} throughout row {row}")
    if method == "exact":
        found = _fit_exact(paths, grid, obs_std, drift, confidence)
    else:
        found = _fit_slope(paths, grid, obs_std, drift, method, confidence)
    if not LOW + 1e-3 < found.hurst < HIGH - 1e-3:
        wrong = (
            "the cumulated sum of a path"
            if found.hurst > 0.5
            else "the increments of a path, or a path with observation noise (obs_std=None fits it)"
        )
        warnings.warn(
            f"hurst ended at the bound {found.hurst:.2f}: fit_hurst takes a path (levels); was this {wrong}?",
            stacklevel=2,
        )
    return found


class _Path:
    """The increments of one path between observed times, and how to whiten them."""

    def __init__(self, path: np.ndarray, times: np.ndarray) -> None:
        seen = ~np.isnan(path)
        self.times, values = times[seen], path[seen]
        self.gaps = np.diff(self.times)
        self.columns = np.stack([np.diff(values), self.gaps], 1)
        self.even = bool(np.ptp(self.gaps) < 1e-6 * self.gaps.mean())
        if not self.even and len(self.gaps) > _DENSE_UP_TO:
            raise ValueError(
                f"series with unequal spacing or missing values must have at most {_DENSE_UP_TO} of them, got "
                f"{len(self.gaps) + 1}: use MarkovFBM.log_prob, whose cost grows linearly"
            )

    def whiten(self, hurst: float, noise: float) -> tuple[np.ndarray, float]:
        """Whitened columns and log determinant, for an increment variance of 1 at time 1 and noise variance."""
        n = len(self.gaps)
        if self.even:
            row = self.gaps.mean() ** (2 * hurst) * increment_covariance(n, hurst).numpy()
            row[0] += 2 * noise
            if n > 1:
                row[1] -= noise
            if n > _LEVINSON_FROM:
                return _durbin_levinson(row, self.columns)
            covariance = toeplitz(row)
        else:
            since = torch.from_numpy(self.times - self.times[0])
            level = fbm_covariance(since[:, None], since, hurst, "I", normalize=True)
            covariance = np.diff(np.diff(level.numpy(), axis=0), axis=1)
            covariance += noise * (2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1))
        factor = np.linalg.cholesky(covariance)
        white = solve_triangular(factor, self.columns, lower=True, check_finite=False)
        return white, 2 * float(np.log(np.diag(factor)).sum())


def _durbin_levinson(row: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, float]:
    """Innovations of ``columns`` ``(n, c)`` over their deviations, by a Toeplitz covariance with this first row."""
    n = len(row)
    white = np.empty_like(columns)
    phi, row_back, columns_back = np.zeros(n), row[::-1].copy(), columns[::-1].copy()
    variance, log_det = row[0], 0.0
    for t in range(n):
        if t:
            kappa = (row[t] - phi[: t - 1] @ row_back[n - t : n - 1]) / variance
            phi[: t - 1] -= kappa * phi[: t - 1][::-1]
            phi[t - 1] = kappa
            variance *= 1 - kappa**2
        past = phi[:t] @ columns_back[n - t :] if t else 0.0
        white[t] = (columns[t] - past) / math.sqrt(variance)
        log_det += math.log(variance)
    return white, log_det


def _fit_exact(paths: np.ndarray, grid: np.ndarray, obs_std: float | None, drift: bool, confidence: float) -> HurstFit:
    rows = [_Path(path, grid) for path in paths]
    count = sum(len(row.gaps) for row in rows)
    unit = sum(float(row.columns[:, 0] @ row.columns[:, 0]) for row in rows) / count  # of the paths' own units

    def profile(hurst: float, log_ratio: float | None) -> tuple[float, float, float]:
        """Log density, scale and drift at the best scale; ``log_ratio`` is that of noise to scale, or ``None``."""
        ratio = 0.0 if log_ratio is None else math.exp(2 * log_ratio)
        parts = [row.whiten(hurst, ratio) for row in rows]
        white = np.concatenate([part[0] for part in parts])
        log_det = sum(part[1] for part in parts)
        slope = float(white[:, 0] @ white[:, 1] / (white[:, 1] @ white[:, 1])) if drift else 0.0
        square = float(np.square(white[:, 0] - slope * white[:, 1]).sum()) / count
        return -0.5 * (count * (math.log(2 * math.pi * square) + 1) + log_det), math.sqrt(square), slope

    gap = float(np.mean(np.concatenate([row.gaps for row in rows])))

    def best(hurst: float) -> tuple[float, float, float, float]:
        """Log density, scale, drift and noise at the best scale and noise."""
        if obs_std == 0:
            return (*profile(hurst, None), 0.0)
        # The ratio is counted from that of one increment, so that it does not depend on units.
        centre = hurst * math.log(gap)
        if obs_std is None:
            search = minimize_scalar(
                lambda r: -profile(hurst, centre + r)[0], bounds=_LOG_RATIOS, method="bounded", options={"xatol": 1e-3}
            )
            found, bare = profile(hurst, centre + search.x), profile(hurst, None)
            if bare[0] >= found[0]:
                return (*bare, 0.0)
            return (*found, found[1] * math.exp(centre + search.x))

        def given(log_scale: float) -> float:
            return _fixed_noise_log_prob(rows, hurst, math.exp(log_scale), obs_std, drift)[0]

        middle = 0.5 * math.log(unit) - centre
        search = minimize_scalar(
            lambda x: -given(x), bounds=(middle - 12, middle + 3), method="bounded", options={"xatol": 1e-3}
        )
        scale = math.exp(search.x)
        value, slope = _fixed_noise_log_prob(rows, hurst, scale, obs_std, drift)
        return value, scale, slope, obs_std

    search = minimize_scalar(lambda h: -best(h)[0], bounds=(LOW, HIGH), method="bounded", options={"xatol": 1e-5})
    hurst = float(search.x)
    log_prob, scale, slope, noise = best(hurst)

    def shortfall(h: float) -> float:
        return 2 * (log_prob - best(h)[0]) - float(chi2.ppf(confidence, 1))

    low = LOW if shortfall(LOW) <= 0 else float(brentq(shortfall, LOW, hurst, xtol=1e-4))
    high = HIGH if shortfall(HIGH) <= 0 else float(brentq(shortfall, hurst, HIGH, xtol=1e-4))
    # The curvature is taken over most of the interval, where the profile is smooth to more than rounding.
    step = max(1e-3, min(0.01, (hurst - LOW) / 2, (HIGH - hurst) / 2))
    curvature = (2 * log_prob - best(hurst + step)[0] - best(hurst - step)[0]) / step**2
    std_error = curvature**-0.5 if curvature > 0 else (high - low) / 2 / math.sqrt(float(chi2.ppf(confidence, 1)))
    return HurstFit(hurst, low, high, std_error, scale, noise, slope, log_prob)


def _fixed_noise_log_prob(
    rows: list[_Path], hurst: float, scale: float, obs_std: float, drift: bool
) -> tuple[float, float]:
    parts = [row.whiten(hurst, (obs_std / scale) ** 2) for row in rows]
    white = np.concatenate([part[0] for part in parts]) / scale
    count = len(white)
    slope = float(white[:, 0] @ white[:, 1] / (white[:, 1] @ white[:, 1])) if drift else 0.0
    square = float(np.square(white[:, 0] - slope * white[:, 1]).sum())
    log_det = sum(part[1] for part in parts) + 2 * count * math.log(scale)
    return -0.5 * (count * math.log(2 * math.pi) + log_det + square), slope


def _fit_slope(
    paths: np.ndarray, grid: np.ndarray, obs_std: float | None, drift: bool, method: str, confidence: float
) -> HurstFit:
    gaps = np.diff(grid)
    if np.isnan(paths).any() or np.ptp(gaps) > 1e-6 * gaps.mean() or obs_std != 0 or drift:
        raise ValueError(f"method must be 'exact' for unequal spacing, missing values, noise or drift, got {method!r}")
    estimate = _dfa if method == "dfa" else _rescaled_range
    hurst = float(np.clip(estimate(paths).mean(), LOW, HIGH))
    m, n = paths.shape
    generator = torch.Generator().manual_seed(0)
    replicates = sample_fbm(torch.arange(n), hurst, m * _REPLICATES, normalize=True, generator=generator).numpy()
    errors = estimate(replicates).reshape(_REPLICATES, m).mean(1) - hurst
    tail = 50 * (1 - confidence)
    low, high = np.clip(hurst - np.percentile(errors, [100 - tail, tail]), LOW, HIGH)
    scale = float(np.diff(paths).std() / gaps.mean() ** hurst)
    return HurstFit(hurst, float(low), float(high), float(errors.std()), scale, 0.0, 0.0, math.nan)


def _windows(n: int, smallest: int) -> np.ndarray:
    largest = max(smallest + 2, n // 4)
    return np.unique(np.geomspace(smallest, largest, 16).astype(int))


def _slopes(sizes: np.ndarray, logs: np.ndarray) -> np.ndarray:
    x = np.log(sizes) - np.log(sizes).mean()
    return (logs @ x) / (x @ x)


def _dfa(paths: np.ndarray) -> np.ndarray:
    """Exponent of the residuals of straight lines in windows of the path, for each row."""
    sizes = _windows(paths.shape[1], 8)
    logs = []
    for size in sizes:
        number = paths.shape[1] // size
        pieces = paths[:, : number * size].reshape(len(paths), number, size)
        x = np.arange(size) - (size - 1) / 2
        pieces = pieces - pieces.mean(-1, keepdims=True)
        residual = pieces - (pieces @ x / (x @ x))[..., None] * x
        logs.append(0.5 * np.log(np.square(residual).mean((1, 2))))
    return _slopes(sizes, np.stack(logs, 1))


def _rescaled_range(paths: np.ndarray) -> np.ndarray:
    """Exponent of the range over the deviation of increments, less that expected of white noise, plus a half."""
    steps = np.diff(paths)
    sizes = _windows(steps.shape[1], 8)
    logs = []
    for size in sizes:
        number = steps.shape[1] // size
        pieces = steps[:, : number * size].reshape(len(steps), number, size)
        pieces = pieces - pieces.mean(-1, keepdims=True)
        walks = pieces.cumsum(-1)
        ranges = np.maximum(walks.max(-1), 0) - np.minimum(walks.min(-1), 0)
        deviation = np.sqrt(np.square(pieces).mean(-1))
        i = np.arange(1, size)
        log_gamma = math.lgamma((size - 1) / 2) - math.lgamma(size / 2)
        expected = math.exp(log_gamma) / math.sqrt(math.pi) * np.sqrt((size - i) / i).sum()
        logs.append(np.log((ranges / np.maximum(deviation, 1e-300)).mean(-1)) - math.log(expected))
    return 0.5 + _slopes(sizes, np.stack(logs, 1))
