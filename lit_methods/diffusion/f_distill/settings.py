"""The settings of f-distill, and what its parts must have in common."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.f_distill.weights import RatioNormalizer
from lit_methods.diffusion.grids import check_path, noise_range
from lit_methods.diffusion.naming import check_finite_fields
from lit_methods.diffusion.processes import Process
from lit_methods.diffusion.time_samplers import TimeSampler
from lit_methods.diffusion.weightings import Weighting, as_weighting


@dataclass(frozen=True)
class DensityRatio:
    """How the discriminator's logits become weights.

    Args:
        clip: smallest and largest ratio, 0 < low < high.
        bins: noise levels at each of which the mean ratio is scaled to 1, >= 1.
        spacing: bins of equal width in ``"time"``, as in the authors' code (with EDM's times most samples are in the
            first), or in the logarithm of ``sigma / alpha``, ``"log_sigma"``; or of equal share, ``"quantile"``.
        ema: share of the former mean of a bin that is kept, in [0, 1).
        normalize: whether weights are divided by their mean over the batch and all ranks.

    Raises:
        ValueError: an argument out of range.
    """

    clip: tuple[float, float] = (0.1, 20.0)
    bins: int = 10
    spacing: Literal["time", "log_sigma", "quantile"] = "time"
    ema: float = 0.0
    normalize: bool = True

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if len(self.clip) != 2 or not 0 < self.clip[0] < self.clip[1]:
            raise ValueError(f"clip must be two rising numbers > 0, got {self.clip}")
        if self.bins < 1:
            raise ValueError(f"bins must be >= 1, got {self.bins}")
        if self.spacing not in ("time", "log_sigma", "quantile"):
            raise ValueError(f"spacing must be 'time', 'log_sigma' or 'quantile', got {self.spacing!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")


@dataclass(frozen=True)
class Critics:
    """How the model of the student's samples and the discriminator learn.

    Args:
        fake_weighting: of the fake score's squared error, an object or a name as in
            :class:`~lit_methods.diffusion.Diffusion`; ``"uniform"``: 1 for the network's own prediction;
            ``Uniform("x0")``: 1 for the clean sample; ``"edm"``: Karras et al.'s.
        discriminator_features: whose features the discriminator reads: ``"teacher"``, frozen (f-distill), or
            ``"fake_score"``, whose trunk then learns from the discriminator's loss too (the original DMD2).
        r1_weight: weight of the squared difference of logits of data and of data with a little noise, >= 0; 100 to 1000
            when used.
        r1_noise: standard deviation of that noise, > 0.
        same_noise: whether data get the times and the noise of the student's samples instead of their own.

    Raises:
        ValueError: an argument out of range.
    """

    fake_weighting: str | Weighting = "uniform"
    discriminator_features: Literal["teacher", "fake_score"] = "teacher"
    r1_weight: float = 0.0
    r1_noise: float = 0.1
    same_noise: bool = False

    def __post_init__(self) -> None:
        check_finite_fields(self)
        as_weighting(self.fake_weighting)
        if self.discriminator_features not in ("teacher", "fake_score"):
            raise ValueError(
                f"discriminator_features must be 'teacher' or 'fake_score', got {self.discriminator_features!r}"
            )
        if self.r1_weight < 0:
            raise ValueError(f"r1_weight must be >= 0, got {self.r1_weight}")
        if not self.r1_noise > 0:
            raise ValueError(f"r1_noise must be > 0, got {self.r1_noise}")


def make_normalizer(
    ratio: DensityRatio, process: Process, sampler: TimeSampler
) -> tuple[RatioNormalizer, Callable[[Tensor], Tensor]]:
    """The normaliser, and where in its bins a time is."""
    common: Any = {"num_bins": ratio.bins, "ema": ratio.ema, "clip": ratio.clip}
    if ratio.spacing == "log_sigma":
        low, high = (float(s) for s in noise_range(process, 0.002, 80.0))
        return RatioNormalizer(low, high, spacing="log_time", **common), lambda t: (-process.lam(t)).exp()
    if ratio.spacing == "quantile":
        edges = sampler.quantile(torch.arange(1, ratio.bins, dtype=torch.float64) / ratio.bins, process).tolist()

        def share(t: Tensor) -> Tensor:
            return sum(((t >= edge).to(t.dtype) for edge in edges), start=torch.full_like(t, 0.5)) / ratio.bins

        return RatioNormalizer(0.0, 1.0, **common), share
    return RatioNormalizer(process.t_min, process.t_max, **common), lambda t: t


def check_networks(teacher: Denoiser, student: Denoiser, fake_score: Denoiser) -> None:
    """Refuse networks that cannot work together."""
    for name, part in (("student", student), ("fake_score", fake_score)):
        if part is teacher:
            raise ValueError(f"{name} must not be the teacher itself, which is frozen: leave it out for a copy")
        if not any(p.requires_grad for p in part.parameters()):
            raise ValueError(f"{name} must have parameters to train; {type(part.net).__name__} has none")
        if part.process != teacher.process:
            raise ValueError(f"{name} must have the process of the teacher, {teacher.process}, got {part.process}")
        if (part.conditioning is None) != (teacher.conditioning is None):
            raise ValueError(f"{name} must have a conditioning if, and only if, the teacher has one")
        shapes = part.sample_shape, teacher.sample_shape
        if None not in shapes and shapes[0] != shapes[1]:
            raise ValueError(f"{name} must make samples of the teacher's shape, {shapes[1]}, got {shapes[0]}")
    if student is fake_score:
        raise ValueError("fake_score must not be the student itself")
    if student.prediction in ("epsilon", "score") and float(student.process.alpha(student.process.t_max)) == 0:
        raise ValueError(
            f"student must predict x0, flow, v_prediction or edm for {student.process}, whose last time is pure noise, "
            f"got {student.prediction!r}: there it says nothing of the data"
        )


def checked_guidance(scale: float | None, teacher: Denoiser) -> float:
    """The scale, 1 for none, if the teacher can be guided by it."""
    if scale is None:
        return 1.0
    if not 0 <= scale < math.inf:
        raise ValueError(f"guidance_scale must be >= 0 and finite, got {scale}")
    if scale != 1 and (teacher.conditioning is None or teacher.conditioning.dropout == 0):
        raise ValueError(
            f"guidance_scale={scale} needs a teacher with a negative condition: a conditioning whose dropout is > 0"
        )
    return scale


def checked_student_times(times: Sequence[float] | None, process: Process) -> list[float]:
    """The times at which the student is called, of which ``None`` is the first possible one."""
    if times is None:
        return [process.t_max]
    if not times or times[0] != process.t_max:
        raise ValueError(f"student_times must begin with the time of pure noise, {process.t_max}, got {list(times)}")
    if len(times) > 1:
        check_path(times, process)
    if times[-1] <= process.t_clean:
        raise ValueError(f"student_times must end before the data, after {process.t_clean}, got {list(times)}")
    return [float(t) for t in times]
