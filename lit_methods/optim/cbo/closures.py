"""From the closure that a user gives to the losses of particles."""

import inspect
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lit_methods.optim.cbo.layout import ParticleLayout
from lit_methods.optim.cbo.ranks import ParticleRanks

__all__ = ["particle_losses"]

Particles = dict[str, Tensor]
Losses = Callable[[Particles], Tensor]
Evaluate = Callable[[Tensor], Tensor]


def particle_losses(
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    chunk_size: int | None = None,
) -> Losses:
    """What :class:`~lit_methods.optim.CBO` wants as closure: every particle's loss on a batch ``(x, y)``, in one call.

    The module runs once for all particles (``vmap`` over ``functional_call``). What the particles do not hold, frozen
    parameters and buffers, is the module's own. Batch normalisation in training mode takes the batch's statistics and
    leaves the running ones alone; dropout is drawn anew for each particle, from the global generator. A network in
    bfloat16 or float16 gets particles rounded to its dtypes, and the loss its outputs in float32: losses in half
    precision could not tell the particles apart.

    Args:
        module: maps ``x`` to outputs. The optimizer must have its ``named_parameters()``.
        loss: maps (outputs, ``y``) to a scalar.
        batch: ``(x, y)``.
        chunk_size: how many particles run at a time, to save memory; None for all.

    Returns:
        A function of the particles, name -> ``(n, *shape)``, to their losses ``(n,)``.

    Raises:
        ValueError: from the function: the particles have names that the module does not know.
    """
    x, y = batch
    dtypes = {name: p.dtype for name, p in module.named_parameters(remove_duplicate=False)}
    moving = _running_statistics(module)

    def loss_of_one(particle: Particles, statistics: Particles) -> Tensor:
        rounded = {name: p.to(dtypes[name]) for name, p in particle.items()}
        outputs = functional_call(module, {**rounded, **statistics}, (x,))
        half = isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16)
        return loss(outputs.float() if half else outputs, y)

    run = vmap(loss_of_one, randomness="different", chunk_size=chunk_size)

    def losses(particles: Particles) -> Tensor:
        if not particles.keys() <= dtypes.keys():
            raise ValueError(
                f"the module has no parameters {sorted(particles.keys() - dtypes.keys())}: build the optimizer of its "
                "named_parameters()"
            )
        number = len(next(iter(particles.values())))
        return run(particles, {name: b.expand(number, *b.shape).clone() for name, b in moving.items()})

    return losses


def _running_statistics(module: nn.Module) -> Particles:
    """Buffers that a forward pass in training mode changes: each particle needs its own, to be thrown away."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.training and layer.track_running_stats
        for name, buffer in layer.named_buffers(recurse=False)
    }


def batched(layout: ParticleLayout, ranks: ParticleRanks, losses_of: Losses) -> Evaluate:
    """Losses ``(runs, n)`` of points ``(runs, n, d)`` by one call of ``losses_of``."""
    if ranks.own_coordinates:
        raise ValueError(
            "closure must return the loss of the parameters' present values where these are DTensors (FSDP2): a "
            "rank holds a part of every particle, and cannot evaluate them at once. Call the module in it"
        )

    def evaluate(points: Tensor) -> Tensor:
        number = points.shape[0] * points.shape[1]
        losses = losses_of(layout.of_runs(points))
        if not isinstance(losses, Tensor) or losses.shape != (number,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"the closure must return one loss per particle, shape ({number},), got {got}")
        return losses.to(points.dtype, copy=ranks.size > 1).view(points.shape[:2])

    return evaluate


def one_by_one(layout: ParticleLayout, ranks: ParticleRanks, closure: Callable[[], Any]) -> Evaluate:
    """The same by one call of ``closure`` for each point, with the point in the parameters, which get theirs back."""

    def evaluate(points: Tensor) -> Tensor:
        losses, before = [], layout.current()
        try:
            for point in points.detach().flatten(0, 1):
                with torch.no_grad():
                    layout.write(point)
                with torch.enable_grad():
                    losses.append(torch.as_tensor(closure(), device=points.device).detach().to(points.dtype))
        finally:
            with torch.no_grad():
                layout.write(before)
        found = torch.stack(losses)
        if ranks.own_coordinates and len(losses) > 1 and (found == found[0]).all():
            warnings.warn(
                "all particles have the same loss. FSDP2 keeps parameters that it has gathered until a backward "
                "pass: call backward() in the closure, or fully_shard(..., reshard_after_forward=True)"
            )
        return found.view(points.shape[:2])

    return evaluate


def needs_argument(closure: Callable[..., Any]) -> bool:
    """Whether the closure wants the particles."""
    if isinstance(closure, FunctionType):  # the usual case, without the time that a signature takes
        return closure.__code__.co_argcount > len(closure.__defaults__ or ())
    try:
        inspect.signature(closure).bind()
    except TypeError:
        return True
    return False
