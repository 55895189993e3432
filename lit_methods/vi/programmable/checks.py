"""Whether an estimator is unbiased, and which site makes it noisy."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from lit_methods.vi.programmable.objectives import Objective, make_tape
from lit_methods.vi.programmable.strategies import ENUM, Strategy, support


class GradientCheck(NamedTuple):
    """What :func:`check_gradient` found, one row for each parameter element (flattened, in order).

    Attributes:
        exact: the gradient by enumeration.
        mean: the mean of the estimates.
        standard_error: of that mean.
        z: ``(mean - exact) / standard_error``; 0 where the estimate has no variance and is exact. More than 4 in
            absolute value does not happen to an unbiased estimator in practice.
    """

    exact: Tensor
    mean: Tensor
    standard_error: Tensor
    z: Tensor

    @property
    def unbiased(self) -> bool:
        """Whether all ``|z| <= 4``."""
        return bool((self.z.abs() <= 4).all())


def check_gradient(
    objective: Objective,
    parameters: Iterable[Tensor],
    *data: Any,
    batch_shape: Sequence[int] = (),
    num_samples: int = 1,
    num_repeats: int = 1000,
    max_branches: int = 4096,
) -> GradientCheck:
    """Compare the gradient estimates of an objective with its exact gradient, all choices enumerated.

    Args:
        objective: of programs whose choices are all discrete, with finite support.
        parameters: what is differentiated.
        *data: arguments of the programs.
        batch_shape: as for :class:`Objective`.
        num_samples: of each estimate, >= 1.
        num_repeats: number of estimates, >= 2; the standard error falls with its root.
        max_branches: of the enumeration.

    Raises:
        ValueError: ``num_repeats`` is out of range, or a site cannot be enumerated.
    """
    if num_repeats < 2:
        raise ValueError(f"num_repeats must be >= 2, got {num_repeats}")
    parameters = list(parameters)

    def enumerated(name: str, dist: Distribution, strategy: Strategy) -> Strategy:
        support(dist, name)
        return ENUM

    tape = make_tape(batch_shape, 1, max_branches, enumerated)
    exact = _gradient(objective.estimate(data, tape).surrogate, parameters)
    estimates = torch.stack(
        [
            _gradient(objective(*data, batch_shape=batch_shape, num_samples=num_samples).surrogate, parameters)
            for _ in range(num_repeats)
        ]
    ).double()
    mean, error = estimates.mean(0), estimates.std(0) / num_repeats**0.5
    scale = torch.maximum(exact.double().abs().max(), torch.ones(())) * torch.finfo(exact.dtype).eps
    difference = mean - exact
    z = torch.where(difference.abs() <= 100 * scale, 0.0, difference / (error + scale))
    return GradientCheck(exact, mean, error, z)


class SiteVariance(NamedTuple):
    """A line of :func:`variance_report`.

    Attributes:
        strategy: class name of the estimator; "" for the whole gradient.
        norm: squared length of the mean of what passes the site.
        variance: summed variance of it, over the elements of all parameters.
    """

    strategy: str
    norm: float
    variance: float


def variance_report(
    objective: Objective,
    parameters: Iterable[Tensor],
    *data: Any,
    batch_shape: Sequence[int] = (),
    num_samples: int = 1,
    num_repeats: int = 100,
) -> dict[str, SiteVariance]:
    """Which site's estimator costs you: the variance of the gradient that passes each random choice.

    The gradient of an estimate is the sum of what passes the costs directly and what passes each choice: its value
    (REPARAM), its log-probability (REINFORCE) or its probabilities (ENUM, MVD). A choice that acts on later ones has
    their share in its own too, so the lines do not add up to the whole.

    Args:
        objective: of any programs.
        parameters: what is differentiated.
        *data: arguments of the programs.
        batch_shape: as for :class:`Objective`.
        num_samples: of each estimate, >= 1.
        num_repeats: number of estimates, >= 2.

    Returns:
        Site name -> its line, the most variable first; and ``"total"``.

    Raises:
        ValueError: ``num_repeats`` is out of range.
    """
    if num_repeats < 2:
        raise ValueError(f"num_repeats must be >= 2, got {num_repeats}")
    parameters = list(parameters)
    sums: dict[str, tuple[str, Tensor, Tensor]] = {}

    def add(name: str, strategy: str, gradient: Tensor) -> None:
        gradient = gradient.double()
        _, first, second = sums.get(name, ("", torch.zeros_like(gradient), torch.zeros_like(gradient)))
        sums[name] = (strategy, first + gradient, second + gradient.square())

    for _ in range(num_repeats):
        tape = make_tape(batch_shape, num_samples)
        loss = objective.estimate(data, tape).surrogate.mean()
        add("total", "", _gradient(loss, parameters, retain_graph=True))
        shares: dict[str, tuple[str, Tensor]] = {}
        for site in tape.sites:
            share = _share(loss, site.through, parameters)
            before = shares[site.name][1] if site.name in shares else 0
            shares[site.name] = (type(site.strategy).__name__, before + share)
        for name, (strategy, share) in shares.items():
            add(name, strategy, share)
    report = {}
    for name, (strategy, first, second) in sums.items():
        mean = first / num_repeats
        variance = (second / num_repeats - mean.square()).sum() * num_repeats / (num_repeats - 1)
        report[name] = SiteVariance(strategy, float(mean.square().sum()), max(float(variance), 0.0))
    return dict(sorted(report.items(), key=lambda line: -line[1].variance))


def _gradient(value: Tensor, parameters: list[Tensor], **options: Any) -> Tensor:
    gradients = torch.autograd.grad(value.sum(), parameters, allow_unused=True, materialize_grads=True, **options)
    return torch.cat([g.flatten() for g in gradients])


def _share(loss: Tensor, through: Tensor, parameters: list[Tensor]) -> Tensor:
    if not through.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    (arriving,) = torch.autograd.grad(loss, through, retain_graph=True, allow_unused=True, materialize_grads=True)
    gradients = torch.autograd.grad(
        through, parameters, arriving, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in gradients])
