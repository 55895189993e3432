"""Steering samples: each kind of guidance turns ``(denoiser, x, t, cond)`` into a prediction of the denoiser's kind.

Gradients are taken by ``torch.func``, which works where Lightning predicts (in inference mode).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.naming import check_finite_fields
from lit_methods.diffusion.predictions import combine, point_at


class Guidance(ABC):
    """Gives the prediction that a solver follows instead of the model's own."""

    def __post_init__(self) -> None:
        check_finite_fields(self)

    @abstractmethod
    def __call__(self, denoiser: Denoiser, x: Tensor, t: float, cond: Any) -> Tensor:
        """A prediction of the denoiser's own kind for ``x`` at time ``t``."""

    def check(self, denoiser: Denoiser, cond: Any) -> None:
        """Raise the ``ValueError`` that says why this guidance cannot be used; called once, before sampling."""
        return


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance: ``null + scale (told - null)`` (arXiv 2207.12598).

    One call of the network with twice the rows; with ``scale=1``, and outside of ``interval``, a plain call.

    Args:
        scale: 1 follows the condition as it is, more exaggerates it, 0 ignores it (diffusers' ``guidance_scale``;
            papers that write ``1 + w`` mean ours minus 1).
        interval: smallest and largest time at which to guide (arXiv 2404.07724); ``None``: always.
        rescale: share, in [0, 1], of bringing the guided prediction to the standard deviation of the told one
            (arXiv 2305.08891).

    Raises:
        ValueError: an argument out of range; without a condition, or a null one that was trained.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"scale must be >= 0, got {self.scale}")
        if self.interval is not None and not self.interval[0] < self.interval[1]:
            raise ValueError(f"interval must be two rising times, got {self.interval}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1], got {self.rescale}")

    def check(self, denoiser: Denoiser, cond: Any) -> None:
        """Guidance other than 1 needs a condition and a null one that was trained."""
        if self.scale == 1:
            return
        if cond is None:
            raise ValueError(f"guidance with scale={self.scale} needs cond, got None")
        if denoiser.conditioning is None or denoiser.conditioning.dropout == 0:
            raise ValueError(
                f"guidance with scale={self.scale} needs a model that was also trained without conditions: a "
                "conditioning whose dropout is > 0"
            )

    def __call__(self, denoiser: Denoiser, x: Tensor, t: float, cond: Any) -> Tensor:
        """One call of ``2 batch`` rows, or a plain one."""
        outside = self.interval is not None and not self.interval[0] <= t <= self.interval[1]
        if self.scale == 1 or outside:
            return denoiser(x, t, cond)
        assert denoiser.conditioning is not None
        both = torch.cat([denoiser.conditioning.null(cond), cond])
        null, told = denoiser(torch.cat([x, x]), t, both).chunk(2)
        return _rescaled(torch.lerp(null, told, self.scale), told, self.rescale)


@dataclass(frozen=True)
class Autoguidance(Guidance):
    """Away from a weaker model: ``weak + scale (model - weak)`` (arXiv 2406.02507).

    Args:
        weak: a smaller or less trained denoiser of the same process and prediction.
        scale: 1 does nothing, more exaggerates the difference, >= 0.

    Raises:
        ValueError: an argument out of range, or a weak model of another process or prediction.
    """

    weak: Denoiser
    scale: float = 2.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"scale must be >= 0, got {self.scale}")

    def check(self, denoiser: Denoiser, cond: Any) -> None:
        """Both models must mean the same by their outputs."""
        ours, weak = ((d.process, d.prediction) for d in (denoiser, self.weak))
        if ours != weak:
            raise ValueError(f"weak must have the process and prediction {ours} of the model, got {weak}")

    def __call__(self, denoiser: Denoiser, x: Tensor, t: float, cond: Any) -> Tensor:
        """A call of each model."""
        return torch.lerp(self.weak(x, t, cond), denoiser(x, t, cond), self.scale)


@dataclass(frozen=True)
class ClassifierGuidance(Guidance):
    """Towards what a classifier of noisy samples recognises: ``eps - scale sigma grad log p(y | x)``.

    From Dhariwal and Nichol 2021 (arXiv 2105.05233).

    Args:
        log_prob: ``log p(cond | x)`` of noisy samples, a function of ``(x, t, cond)`` with ``t`` of shape ``(batch,)``
            that gives ``(batch,)``.
        scale: strength, >= 0.

    Raises:
        ValueError: an argument out of range, or no condition.
    """

    log_prob: Callable[[Tensor, Tensor, Any], Tensor]
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"scale must be >= 0, got {self.scale}")

    def check(self, denoiser: Denoiser, cond: Any) -> None:
        """The classifier needs something to recognise."""
        if cond is None:
            raise ValueError("ClassifierGuidance needs cond, got None")

    def __call__(self, denoiser: Denoiser, x: Tensor, t: float, cond: Any) -> Tensor:
        """One call of the model and one of the classifier with its gradient."""
        times = torch.full(x.shape[:1], t, device=x.device)
        gradient = torch.func.grad(lambda x: self.log_prob(x, times, cond).sum())(x)
        # The model itself may or may not be told; whether it is, is its conditioning's affair.
        told = cond if denoiser.conditioning is not None else None
        return _shift_score(denoiser, denoiser(x, t, told), x, t, self.scale * gradient)


@dataclass(frozen=True)
class LossGuidance(Guidance):
    """Towards clean samples of small loss: ``score - scale grad_x loss(x_0(x))``; for inverse problems.

    With ``loss = |y - A(x_0)|^2`` it is diffusion posterior sampling (arXiv 2209.14687): inpainting, super-resolution,
    deblurring with any unconditional model. Costs a backward pass through the network.

    Args:
        loss: loss of each predicted clean sample, ``(batch, ...)`` to ``(batch,)``.
        scale: strength, >= 0.
        normalize: divide each sample's gradient by the square root of its loss, as that paper does, so that ``scale``
            need not know the units of the loss.

    Raises:
        ValueError: an argument out of range.
    """

    loss: Callable[[Tensor], Tensor]
    scale: float = 1.0
    normalize: bool = True

    def __post_init__(self) -> None:
        check_finite_fields(self)
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"scale must be >= 0, got {self.scale}")

    def __call__(self, denoiser: Denoiser, x: Tensor, t: float, cond: Any) -> Tensor:
        """One call of the model with its gradient in ``x``."""

        def total(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            out = denoiser(x, t, cond)
            losses = self.loss(denoiser.clean(out, x, t))
            return losses.sum(), (out, losses)

        gradient, (out, losses) = torch.func.grad(total, has_aux=True)(x)
        if self.normalize:
            gradient = gradient / losses.clamp(min=1e-12).sqrt().view(-1, *[1] * (x.ndim - 1))
        return _shift_score(denoiser, out, x, t, -self.scale * gradient)


def _shift_score(denoiser: Denoiser, out: Tensor, x: Tensor, t: float, shift: Tensor) -> Tensor:
    """The prediction after ``score + shift``; at fixed ``x``, ``eps`` and ``x_0`` shift with it."""
    point = point_at(denoiser.process, t, x)
    if point.alpha == 0:
        return out  # pure noise says nothing of the data, and its score is known
    x0_shift, eps_shift = (point.sigma**2 / point.alpha) * shift, -point.sigma * shift
    return out + combine(x0_shift, eps_shift, denoiser.prediction, point, denoiser.sigma_data)


def _rescaled(guided: Tensor, told: Tensor, share: float) -> Tensor:
    if share == 0:
        return guided
    axes = list(range(1, told.ndim))
    ratio = told.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-12)
    return guided * (1 - share + share * ratio)
