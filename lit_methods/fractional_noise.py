"""Fractional Brownian motion itself: its exact covariance and exact paths. Methods and datamodules both stand on it."""

import math
from typing import Literal

import numpy as np
import torch
from scipy.special import hyp2f1
from torch import Tensor

Kind = Literal["I", "II"]
"""Which fractional Brownian motion: "I" has a past and stationary increments, "II" starts anew at time 0."""


def check_hurst(hurst: float) -> float:
    """The Hurst index.

    Raises:
        ValueError: it is not in (0, 1).
    """
    if not 0 < hurst < 1:
        raise ValueError(f"hurst must be in (0, 1), got {hurst}")
    return hurst


def check_kind(kind: str) -> None:
    """Refuse a kind that there is not.

    Raises:
        ValueError: it is neither "I" nor "II".
    """
    if kind not in ("I", "II"):
        raise ValueError(
            f"kind must be 'I' (two-sided, stationary increments) or 'II' (starts at time 0), got {kind!r}"
        )


def check_times(times: Tensor) -> Tensor:
    """One increasing grid of times >= 0 in float64, on the CPU.

    Raises:
        ValueError: it is empty, has two dimensions, begins before 0, or does not increase strictly.
    """
    times = torch.as_tensor(times).detach().to("cpu", torch.float64)
    if times.ndim != 1 or not len(times):
        raise ValueError(
            f"times must have shape (T,), T >= 1, shared by all series, got shape {tuple(times.shape)}: give the union "
            "of all time stamps, and a mask (batch, T) that says which of them each series has"
        )
    if not times.isfinite().all():
        raise ValueError(f"times must be finite, got {times[~times.isfinite()][0].item()}")
    if (gaps := times.diff()).numel() and not bool((gaps > 0).all()):
        at = int((gaps <= 0).nonzero()[0])
        raise ValueError(f"times must increase strictly, got {times[at]:g} and then {times[at + 1]:g}")
    return times


def unit_variance(hurst: float, kind: Kind) -> float:
    """The variance at time 1 of fractional Brownian motion with the kernel ``(t - s)^(H - 1/2) / Gamma(H + 1/2)``."""
    if kind == "I":
        return 1 / (math.gamma(2 * hurst + 1) * math.sin(math.pi * hurst))
    return 1 / (2 * hurst * math.gamma(hurst + 0.5) ** 2)


def fbm_covariance(t: Tensor, s: Tensor, hurst: float, kind: Kind = "I", normalize: bool = False) -> Tensor:
    r"""Covariance of fractional Brownian motion of either kind at two times.

    Kind I (Mandelbrot, van Ness) has stationary increments and covariance
    :math:`V_H (t^{2H} + s^{2H} - |t - s|^{2H}) / 2` with :math:`V_H = 1 / (\Gamma(2H + 1) \sin \pi H)`. Kind II
    (Riemann, Liouville) starts at time 0 and has variance :math:`t^{2H} / (2H \Gamma(H + 1/2)^2)`. For H = 1/2 both
    are Brownian motion.

    Args:
        t: times >= 0; broadcast against ``s``: ``fbm_covariance(t[:, None], t, ...)`` is the matrix.
        s: times >= 0.
        hurst: Hurst index, in (0, 1).
        kind: "I" or "II".
        normalize: scale the process to variance 1 at time 1, as textbooks do for kind I.

    Returns:
        The covariances in float64.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> one, half = torch.tensor(1.0), torch.tensor(0.5)
        >>> round(fbm_covariance(one, half, 0.7, "II").item(), 6)
        0.407534
    """
    check_hurst(hurst)
    check_kind(kind)
    t, s = torch.broadcast_tensors(*(torch.as_tensor(x).to(torch.float64) for x in (t, s)))
    if bool((t < 0).any()) or bool((s < 0).any()):
        raise ValueError(f"times must be >= 0, got {min(t.min().item(), s.min().item()):g}")
    if kind == "I":
        found = 0.5 * (t ** (2 * hurst) + s ** (2 * hurst) - (t - s).abs() ** (2 * hurst))
        return found if normalize else unit_variance(hurst, kind) * found
    a = hurst + 0.5
    early, late = torch.minimum(t, s), torch.maximum(t, s)
    ratio = torch.where(late > 0, early / late, 1.0)
    integral = early**a * torch.where(late > 0, late, 1.0) ** (a - 1) / a
    found = integral * torch.from_numpy(np.asarray(hyp2f1(1 - a, 1.0, a + 1, ratio.cpu().numpy()))).to(t.device)
    return found * (2 * hurst if normalize else 1 / math.gamma(a) ** 2)


def increment_covariance(num: int, hurst: float) -> Tensor:
    """Covariances at lags ``0 .. num - 1`` of increments over unit steps, kind I with variance 1, float64."""
    lags = torch.arange(num + 1, dtype=torch.float64)
    power = lags ** (2 * hurst)
    after, before = power[1:], torch.cat([power[1:2], power[:-2]])
    return 0.5 * (after - 2 * power[:-1] + before)


def circulant_row(num: int, hurst: float) -> Tensor:
    """First row ``r_0 .. r_{n-1}, r_{n-2} .. r_1`` of the circulant matrix that embeds the increments' covariance."""
    row = increment_covariance(num, hurst)
    return torch.cat([row, row[1:-1].flip(0)])


def sample_fbm(
    times: Tensor,
    hurst: float,
    num_paths: int = 1,
    kind: Kind = "I",
    normalize: bool = False,
    method: Literal["auto", "davies_harte", "cholesky"] = "auto",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Exact paths of fractional Brownian motion.

    Davies and Harte's circulant embedding, in O(n log n), where it is exact: kind I on the grid ``dt, 2 dt, ...`` (or
    ``0, dt, 2 dt, ...``). Otherwise a Cholesky factor of the covariance, in O(n^3).

    Args:
        times: increasing times >= 0, ``(T,)``.
        hurst: Hurst index, in (0, 1).
        num_paths: >= 1.
        kind: "I" or "II", as in :func:`fbm_covariance`.
        normalize: scale to variance 1 at time 1.
        method: "auto" takes the faster of the two that is exact; "davies_harte" refuses where it is not.
        generator: of the random numbers.

    Returns:
        Paths in float64, ``(num_paths, T)``; 0 at time 0.

    Raises:
        ValueError: an argument out of range, or a method that would not be exact.
    """
    check_hurst(hurst)
    check_kind(kind)
    times = check_times(times)
    if times[0] < 0:
        raise ValueError(f"times must be >= 0, got {times[0]:g}")
    if num_paths < 1:
        raise ValueError(f"num_paths must be >= 1, got {num_paths}")
    if method not in ("auto", "davies_harte", "cholesky"):
        raise ValueError(f"method must be 'auto', 'davies_harte' or 'cholesky', got {method!r}")
    later = times[times > 0]
    if not len(later):
        return torch.zeros(num_paths, len(times), dtype=torch.float64)
    step = float(later[-1]) / len(later)
    even = kind == "I" and bool((torch.arange(1, len(later) + 1) * step - later).abs().max() < 1e-6 * step)
    if method == "davies_harte" and not even:
        raise ValueError(
            "method must be 'cholesky' or 'auto' unless the process is of kind 'I' and times are dt, 2 dt, 3 dt, ..., "
            f"got 'davies_harte' with kind {kind!r}"
        )
    if even and method != "cholesky":
        row = circulant_row(len(later), hurst)
        # Filtering white noise by the square root of the spectrum gives exactly the circulant covariance.
        white = torch.randn(num_paths, len(row), dtype=torch.float64, generator=generator)
        spectrum = torch.fft.rfft(row).real.clamp(min=0)
        noise = torch.fft.irfft(torch.fft.rfft(white) * spectrum.sqrt(), n=len(row))[:, : len(later)]
        scale = step**hurst * (1.0 if normalize else unit_variance(hurst, kind) ** 0.5)
        paths = scale * noise.cumsum(1)
    else:
        factor = torch.linalg.cholesky(fbm_covariance(later[:, None], later, hurst, kind, normalize))
        paths = torch.randn(num_paths, len(later), dtype=torch.float64, generator=generator) @ factor.T
    return torch.cat([paths.new_zeros(num_paths, len(times) - len(later)), paths], 1)
