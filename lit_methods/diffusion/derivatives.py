"""Derivatives of a network along a direction, for the losses of flow maps."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Method = Literal["forward", "finite_difference"]


def along(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor], method: Method = "forward"
) -> tuple[Tensor, Tensor]:
    """The value of a function, with its graph, and its derivative along ``tangents``, without one.

    Args:
        function: of the inputs.
        inputs: tensors.
        tangents: a direction for each, of its shape.
        method: ``"forward"``, forward-mode differentiation: exact, about two more forward passes; attention runs in its
            mathematical form, which needs memory for all pairs of tokens. ``"finite_difference"``: two more forward
            passes without gradients and the same dropout; for networks that the first cannot do.

    Raises:
        RuntimeError: the network has an operation without forward-mode derivative; names the way out.
    """
    if method == "finite_difference":
        return _finite_difference(function, inputs, tangents)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            value, derivative = torch.func.jvp(function, tuple(inputs), tuple(tangents))  # type: ignore[misc]
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            "the network has no forward-mode derivative, even with SDPBackend.MATH for its attention: choose "
            f'jvp="finite_difference". It said: {error}'
        ) from error
    return value, derivative.detach()


def _finite_difference(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    # The step balances rounding and curvature; inputs are moved in float64, so that the step is what was meant.
    step = 1e-5 if inputs[0].dtype == torch.float64 else 2e-3
    devices = [inputs[0].device] if inputs[0].is_cuda else []
    sides = []
    for sign in (1, -1):
        moved = [(x.double() + sign * step * d.double()).to(x.dtype) for x, d in zip(inputs, tangents, strict=True)]
        with torch.random.fork_rng(devices), torch.no_grad():
            sides.append(function(*moved))
    return function(*inputs), (sides[0] - sides[1]) / (2 * step)
