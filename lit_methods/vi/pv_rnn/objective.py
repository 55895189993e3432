"""What training and error regression minimise."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lit_methods.vi.pv_rnn.network import PVRNN, PVRNNOutput
from lit_methods.vi.pv_rnn.softmax_code import SoftmaxCode


class StepLosses(NamedTuple):
    """Parts of the loss at each step; 0 where nothing was observed.

    Attributes:
        nll: of the observation, ``(batch, steps)``, in nats up to a constant, over the number of its dimensions.
        kl: of each layer, ``(batch, steps, layers)``, in nats.
        weighted_kl: what ``kl`` adds to the loss, ``(batch, steps)``.
    """

    nll: Tensor
    kl: Tensor
    weighted_kl: Tensor

    def total(self) -> Tensor:
        """Loss of each sequence, ``(batch,)``: the sum over its steps."""
        return (self.nll + self.weighted_kl).sum(1)


class MetaPrior(NamedTuple):
    """Weights of the KL terms, one for each layer: of a sequence's first step, and of the others."""

    first: list[float]
    later: list[float]


def as_meta_prior(
    meta_prior: float | Sequence[float], initial_meta_prior: float | Sequence[float] | None, layers: int
) -> MetaPrior:
    """Check the weights; one number holds for all layers, and ``None`` for the first step is as later.

    Raises:
        ValueError: a weight that is negative or not finite, or as many as there are no layers.
    """
    found = []
    for name, value in (("initial_meta_prior", initial_meta_prior), ("meta_prior", meta_prior)):
        value = meta_prior if value is None else value
        weights = [float(value)] * layers if isinstance(value, int | float) else [float(w) for w in value]
        if len(weights) != layers:
            raise ValueError(f"{name} must be one number or one for each of {layers} layers, got {len(weights)}")
        if not all(0 <= w < math.inf for w in weights):
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        found.append(weights)
    return MetaPrior(*found)


def without_gaps(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values with zeros where nothing was observed, and the mask.

    Zeros are put in before anything is computed: a NaN that is masked afterwards still has NaN gradients.

    Raises:
        ValueError: a shape that does not fit, or an observed value that is not finite, with its place.
    """
    if values.dim() != 3:
        raise ValueError(f"values must be (batch, steps, numbers), got {tuple(values.shape)}")
    if mask is None:
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    if mask.shape != values.shape[:2]:
        raise ValueError(f"mask must be {tuple(values.shape[:2])}, got {tuple(mask.shape)}")
    values = torch.where(mask[..., None], values, 0)
    if not values.isfinite().all():
        row, step, number = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"values must be finite where mask is true, got {float(values[row, step, number])} in row {row}, step "
            f"{step}, number {number}"
        )
    return values, mask


def step_losses(
    network: PVRNN, output: PVRNNOutput, values: Tensor, mask: Tensor, weights: MetaPrior, first: bool
) -> StepLosses:
    """The loss, step by step: ``nll / X + sum_l w_l KL_l / Z_l``, where X and Z_l are numbers of dimensions.

    Args:
        network: whose output it is.
        output: from :meth:`PVRNN.posterior`.
        values: observations ``(batch, steps, output_size)``, finite.
        mask: which steps were observed, ``(batch, steps)``; the others add nothing, neither NLL nor KL.
        weights: of the KL terms.
        first: whether step 0 is the first of its sequence.
    """
    dtype = output.kl.dtype
    if output.logits is not None and isinstance(network.output, SoftmaxCode):
        target = network.output.encode(values.to(dtype))
        nll = functional.kl_div(output.logits.log_softmax(-1), target, reduction="none").sum((2, 3))
    else:
        nll = 0.5 * (output.mean - values.to(dtype)).square().sum(2)
    scale = torch.tensor([weights.later], dtype=dtype, device=nll.device).repeat(nll.shape[1], 1)
    if first:
        scale[0] = torch.tensor(weights.first, dtype=dtype, device=nll.device)
    scale = scale / torch.tensor(network.latent_sizes, dtype=dtype, device=nll.device)
    kl = torch.where(mask[..., None], output.kl, 0)
    return StepLosses(torch.where(mask, nll, 0) / network.output_size, kl, (kl * scale).sum(2))
