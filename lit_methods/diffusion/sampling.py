"""Samples from a denoiser, in any loop: no LightningModule needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.grids import Grid, as_grid, check_path
from lit_methods.diffusion.guidance import ClassifierFree, Guidance
from lit_methods.diffusion.naming import check_finite_fields
from lit_methods.diffusion.processes import Generators, Process, as_process, draw_noise
from lit_methods.diffusion.solvers import Solver, as_solver, nodes

OnStep = Callable[[float, Tensor, Tensor], None]


@dataclass(frozen=True)
class Sampling:
    """How a trained model makes samples.

    Args:
        solver: an object, or one of ``euler heun ddim ancestral dpmpp_2m sde_dpmpp sde_dpmpp_2m edm_churn``.
        steps: steps of the solver, >= 1.
        grid: where the steps lie: an object, or one of ``uniform karras lambda``; ``None``: what suits the process.
        guidance: steers the samples; a number is the scale of classifier-free guidance, 1 for none.

    Raises:
        ValueError: an argument out of range.
    """

    solver: str | Solver = "dpmpp_2m"
    steps: int = 20
    grid: str | Grid | None = None
    guidance: float | Guidance = 1.0

    def __post_init__(self) -> None:
        check_finite_fields(self)
        as_solver(self.solver)
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    shape: Sequence[int] | None = None,
    *,
    solver: str | Solver = "dpmpp_2m",
    steps: int = 20,
    grid: str | Grid | None = None,
    cond: Any = None,
    guidance: float | Guidance = 1.0,
    generator: Generators = None,
    x_init: Tensor | None = None,
    process: str | Process | None = None,
    times: Sequence[float] | Tensor | None = None,
    on_step: OnStep | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Make samples.

    Each solver begins exactly at pure noise and ends with a predicted clean sample, so ``steps`` steps of a solver of
    order one call the network ``steps`` times, Heun's ``2 steps - 1`` times.

    Args:
        denoiser: the model.
        shape: shape of the samples, ``(n, ...)``; may be left out where ``x_init`` is given.
        solver: an object, or one of ``euler heun ddim ancestral dpmpp_2m sde_dpmpp sde_dpmpp_2m edm_churn``.
        steps: number of steps, >= 1.
        grid: where they lie: an object, or one of ``uniform karras lambda``; ``None``: what suits the process.
        cond: one condition per sample, if the model takes any.
        guidance: an object, or the scale of classifier-free guidance: 1 for none.
        generator: source of randomness; a list with one for each sample makes every sample its own: it does not depend
            on the others then.
        x_init: samples to start from at the first time, instead of pure noise.
        process: path to follow, where it is not the model's own.
        times: falling times to step through, instead of ``steps`` and ``grid``; they may end before the data.
        on_step: called with the time, the noisy and the predicted clean samples whenever the network was.
        device: of the samples; default: that of the model's parameters.
        dtype: of the samples; default: float32.

    Returns:
        The samples, without clipping unless the denoiser clips.

    Raises:
        ValueError: an argument out of range; a prediction of the noise cannot start from pure noise.
    """
    if process is not None:
        denoiser = denoiser.under(process)
    path = as_process(denoiser.process)
    chosen = as_grid(grid, path).times(path, steps) if times is None else check_path(times, path)
    steer = guidance if isinstance(guidance, Guidance) else ClassifierFree(scale=guidance)
    steer.check(denoiser, cond)
    _check_start(denoiser, float(chosen[0]))
    if x_init is None:
        if shape is None:
            raise ValueError("shape must be given where x_init is not")
        device = device or next((p.device for p in denoiser.parameters()), None)
        x = draw_noise(shape, generator, device, dtype) * float(path.at(chosen[0]).sigma)
    elif shape is not None and tuple(shape) != tuple(x_init.shape):
        raise ValueError(f"shape must be that of x_init, {tuple(x_init.shape)}, got {tuple(shape)}")
    else:
        x = x_init if dtype is None else x_init.to(dtype)
    if cond is not None and len(cond) != len(x):
        raise ValueError(f"cond must hold one condition for each of {len(x)} samples, got {len(cond)}")

    route = nodes(path, chosen)
    points = {node.t: node.point for node in route}

    def predict(x: Tensor, t: float) -> Tensor:
        x0 = denoiser.clean(steer(denoiser, x, t, cond), x, t, points.get(t))
        if on_step is not None:
            on_step(t, x, x0)
        return x0

    def noise(x: Tensor) -> Tensor:
        return draw_noise(x.shape, generator, x.device, x.dtype)

    return as_solver(solver).solve(predict, x, route, path, noise)


def _check_start(denoiser: Denoiser, start: float) -> None:
    if denoiser.prediction in ("epsilon", "score") and float(denoiser.process.alpha(start)) == 0:
        raise ValueError(
            f"prediction {denoiser.prediction!r} cannot start at t={start:g} of {denoiser.process}, where alpha is 0 "
            "and the noise says nothing of the data: train x0, flow or v_prediction, or start earlier by times="
        )
