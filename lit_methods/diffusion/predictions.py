"""What a network may predict, and how one prediction becomes another.

Each prediction is ``a x_0 + b eps`` with two numbers that depend on the time only, and ``x = alpha x_0 + sigma eps``.
Two equations with two unknowns: all conversions, targets and changes of loss weights follow from ``(a, b)``.

| prediction | a | b | |
|---|---|---|---|
| ``x0`` | 1 | 0 | the clean sample |
| ``epsilon`` | 0 | 1 | the noise |
| ``score`` | 0 | -1 / sigma | the gradient of the log-density |
| ``flow`` | alpha' | sigma' | the velocity ``dx/dt``; for flow matching ``eps - x_0`` |
| ``v_prediction`` | -sigma | alpha | Salimans and Ho's v |
| ``edm`` | sigma / (s r) | -s alpha / r | F of Karras et al., ``s = sigma_data``, ``r^2 = sigma^2 + alpha^2 s^2`` |
"""

from typing import Any

import torch
from torch import Tensor

from lit_methods.diffusion.processes import Point, Process, per_sample

PREDICTIONS = ("x0", "epsilon", "score", "flow", "v_prediction", "edm")


def check_prediction(name: str, prediction: str) -> str:
    """Return it, or raise the ``ValueError`` that lists what there is."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"{name} must be one of {list(PREDICTIONS)}, got {prediction!r}")
    return prediction


def coefficients(prediction: str, point: Point, sigma_data: float = 0.5) -> tuple[Any, Any]:
    """``(a, b)`` of the prediction ``a x_0 + b eps``."""
    alpha, sigma = point.alpha, point.sigma
    if prediction == "x0":
        return 1.0, 0.0
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "score":
        return 0.0, -1 / _nonzero(sigma)
    if prediction == "flow":
        return point.d_alpha, point.d_sigma
    if prediction == "v_prediction":
        return -sigma, alpha
    norm = scale(point, sigma_data)
    return sigma / (sigma_data * norm), -sigma_data * alpha / norm


def determinant(prediction: str, point: Point, sigma_data: float = 0.5) -> Any:
    """``alpha b - sigma a``: at fixed ``x``, an error ``d`` of x_0 is one of ``-determinant / sigma * d`` here."""
    a, b = coefficients(prediction, point, sigma_data)
    return point.alpha * b - point.sigma * a


def scale(point: Point, sigma_data: float) -> Any:
    """Standard deviation of ``x`` for data of standard deviation ``sigma_data``."""
    return (point.sigma**2 + (point.alpha * sigma_data) ** 2) ** 0.5


def clean_and_noise(
    out: Tensor, x: Tensor, prediction: str, point: Point, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """``(x_0, eps)`` of a prediction for ``x``.

    Where one of them is not determined (noise at ``sigma = 0``, data at ``alpha = 0`` from a prediction of the noise)
    it is a huge number rather than a guess.
    """
    if prediction == "score":
        prediction, out = "epsilon", -point.sigma * out
    a, b = coefficients(prediction, point, sigma_data)
    over = 1 / _nonzero(determinant(prediction, point, sigma_data))
    x0 = out if prediction == "x0" else mix(b * over, x, -point.sigma * over, out)
    eps = out if prediction == "epsilon" else mix(point.alpha * over, out, -a * over, x)
    return x0, eps


def clean(out: Tensor, x: Tensor, prediction: str, point: Point, sigma_data: float = 0.5) -> Tensor:
    """``x_0`` of a prediction for ``x``; the first of :func:`clean_and_noise`."""
    if prediction == "x0":
        return out
    if prediction == "score":
        prediction, out = "epsilon", -point.sigma * out
    over = 1 / _nonzero(determinant(prediction, point, sigma_data))
    return mix(coefficients(prediction, point, sigma_data)[1] * over, x, -point.sigma * over, out)


def mix(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """``a x + b y``; with plain numbers in two operations instead of three."""
    if isinstance(b, Tensor):
        return a * x + b * y
    return torch.add(x if isinstance(a, float) and a == 1 else a * x, y, alpha=b)


def convert(
    out: Tensor, x: Tensor, t: Tensor | float, src: str, dst: str, process: Process, sigma_data: float = 0.5
) -> Tensor:
    """Turn one prediction into another.

    Args:
        out: prediction of kind ``src``, shaped like ``x``.
        x: the noisy samples ``(batch, ...)`` that it was made for.
        t: their times, ``(batch,)`` or a single one.
        src: ``x0 epsilon score flow v_prediction edm``.
        dst: likewise.
        process: the path.
        sigma_data: standard deviation of the data; matters for ``edm`` only.

    Returns:
        The prediction of kind ``dst``, in at least float32.

    Raises:
        ValueError: an unknown kind, or shapes that do not fit.
    """
    check_prediction("src", src)
    check_prediction("dst", dst)
    check_output(out, x)
    if src == dst:
        return out
    point = point_at(process, t, x)
    x0, eps = clean_and_noise(out, x, src, point, sigma_data)
    return combine(x0, eps, dst, point, sigma_data)


def combine(x0: Tensor, eps: Tensor, prediction: str, point: Point, sigma_data: float = 0.5) -> Tensor:
    """``a x_0 + b eps``: a prediction of what is known, or the target of a network."""
    if prediction == "x0":
        return x0
    if prediction == "epsilon":
        return eps
    a, b = coefficients(prediction, point, sigma_data)
    return b * eps if prediction == "score" else a * x0 + b * eps


def point_at(process: Process, t: Tensor | float, x: Tensor) -> Point:
    """Where the path is at the times of samples ``x``, in shapes that multiply ``x``."""
    if isinstance(t, float | int):
        return Point(*(float(value) for value in process.at(float(t))))
    return Point(*(per_sample(value, x) for value in process.at(t)))


def check_output(out: Tensor, x: Tensor) -> None:
    """Refuse a prediction that is not shaped like its input."""
    if out.shape != x.shape:
        raise ValueError(f"a prediction must have the shape of x, {tuple(x.shape)}, got {tuple(out.shape)}")


def _nonzero(value: Any) -> Any:
    """Keep away from dividing by zero."""
    tiny = 1e-15
    if isinstance(value, Tensor):
        return torch.where(value.abs() < tiny, torch.full_like(value, tiny), value)
    return tiny if abs(value) < tiny else value
