"""How particles move to a consensus point: what several optimizers share."""

import warnings
from typing import Any

import torch
from torch import Tensor

from lit_methods.optim.cbo.swarm import ParticleOptimizer
from lit_methods.optim.foundation.groups import check_choice, check_nonnegative, check_positive


def move(optimizer: ParticleOptimizer, points: Tensor, center: Tensor) -> None:
    """Drift to ``center`` and noise, in place; a group with ``lr=0`` stays as it is.

    Args:
        optimizer: whose groups have ``lr``, ``lambda_``, ``sigma`` and the shared ``noise``.
        points: ``(runs, n, d)``.
        center: ``(runs, 1, d)``, or ``(runs, n, d)`` for a consensus point of each particle's own.
    """
    isotropic = optimizer.param_groups[0]["noise"] == "isotropic"
    distance = optimizer.ranks.norm(points - center) if isotropic else None
    for group, part, goal in optimizer.layout.parts(points, center):
        drift, spread = 1 - group["lambda_"] * group["lr"], group["sigma"] * group["lr"] ** 0.5
        if distance is None:
            torch.lerp(goal, part, optimizer.noise(part.shape, drift, spread), out=part)
        else:
            noise = optimizer.noise(part.shape, 0.0, spread)
            torch.lerp(goal, part, drift, out=part)
            part.addcmul_(noise, distance)


def cloud(optimizer: ParticleOptimizer, current: Tensor, rows: int) -> Tensor:
    """New normal particles ``(rows, d)`` around 0 or ``current`` (d,)."""
    shared = optimizer.param_groups[0]
    points = current.new_empty(rows, len(current))
    optimizer.fill_normal(points, 0.0, shared["init_std"])
    return points.add_(current) if shared["init_around_current"] else points


def warn_of_divergence(group: dict[str, Any], dim: int) -> None:
    """Say when drift and noise make the particles run away from their consensus in ``dim`` dimensions."""
    others = dim - 1 if group["noise"] == "isotropic" else 0
    variance = group["sigma"] ** 2 * group["lr"]
    normal = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    stretch = (1 - group["lambda_"] * group["lr"] + variance**0.5 * normal).square() + variance * others
    density = torch.exp(-normal.square() / 2)
    if (density * stretch.clamp(min=1e-30).log()).sum() > 1e-9:
        warnings.warn(
            f"with sigma={group['sigma']:g}, lr={group['lr']:g}, lambda_={group['lambda_']:g} and {group['noise']} "
            f"noise in {dim} dimensions the particles run away from their consensus; lower sigma"
        )


def check_motion(group: dict[str, Any]) -> None:
    """Refuse settings of drift, noise and start out of range."""
    check_positive(lambda_=group["lambda_"], init_std=group["init_std"])
    check_nonnegative(sigma=group["sigma"])
    check_choice("noise", group["noise"], ("anisotropic", "isotropic"))


def check_number(num_particles: int) -> None:
    """Refuse fewer than one particle; warn of a single one."""
    if num_particles < 1:
        raise ValueError(f"num_particles must be >= 1, got {num_particles}")
    if num_particles == 1:
        warnings.warn("num_particles=1: a single particle is its own consensus point and never moves")
