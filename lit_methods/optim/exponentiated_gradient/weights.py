"""Weights for sign-preserving optimizers: how to draw them, how to split biases, and which optimizer trains which."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lit_methods.optim.foundation.groups import check_choice, check_positive


@torch.no_grad()
def lognormal_(
    tensor: Tensor,
    gain: float = 1.0,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    mean_std_ratio: float = 1.5,
    signs: Literal["random", "positive"] = "random",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fill a weight in place with log-normal magnitudes and signs; the standard deviation is ``gain / sqrt(fan)``.

    With :math:`s = gain / \sqrt{fan\,(1 + r^2)}` the magnitude has mean ``r s`` and standard deviation ``s``; times
    random signs the variance is :math:`(1 + r^2) s^2`. As ``lognormal_`` of the authors of bioRxiv 2024.10.25.620272.

    Args:
        tensor: at least two dimensions, ``(out, in, ...)``.
        gain: as in ``torch.nn.init``, > 0; ``1 / sqrt(3)`` gives the spread of torch's own default.
        mode: whether the fan is the number of inputs or of outputs.
        mean_std_ratio: r, mean over standard deviation of the magnitudes, > 0.
        signs: "random", or "positive" for weights that must be.
        generator: of the draws; None: torch's global one.

    Returns:
        The tensor.

    Raises:
        ValueError: an argument out of range.
    """
    check_positive(gain=gain, mean_std_ratio=mean_std_ratio)
    check_choice("mode", mode, ("fan_in", "fan_out"))
    check_choice("signs", signs, ("random", "positive"))
    if tensor.ndim < 2:
        raise ValueError(f"tensor must have at least 2 dimensions to have a fan, got shape {tuple(tensor.shape)}")
    fan = tensor[0].numel() if mode == "fan_in" else tensor[:, 0].numel()
    mean = mean_std_ratio * gain / math.sqrt(fan * (1 + mean_std_ratio**2))
    spread = math.log1p(mean_std_ratio**-2)  # variance of the logarithm
    tensor.log_normal_(math.log(mean) - spread / 2, math.sqrt(spread), generator=generator)
    if signs == "random":
        tensor.mul_(2 * torch.empty_like(tensor).bernoulli_(0.5, generator=generator) - 1)
    return tensor


class SplitBias(nn.Module):
    """A bias as the sum of a positive and a negative one, which exponentiated gradients can move to either side.

    A parametrization of ``torch.nn.utils.parametrize``; :func:`dale_init_` puts it on every bias of a network, and
    ``parametrize.register_parametrization(layer, "bias", SplitBias())`` on one. It keeps the bias as it is: the parts
    are the bias's own positive and negative parts, each moved away from zero by ``margin``.

    Args:
        margin: > 0.

    Raises:
        ValueError: ``margin`` out of range.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 2)
        >>> before = layer.bias.detach().clone()
        >>> _ = torch.nn.utils.parametrize.register_parametrization(layer, "bias", SplitBias())
        >>> torch.testing.assert_close(layer.bias, before)
        >>> sorted(name for name, _ in layer.named_parameters() if "bias" in name)
        ['parametrizations.bias.original0', 'parametrizations.bias.original1']
    """

    def __init__(self, margin: float = 1e-2) -> None:
        super().__init__()
        check_positive(margin=margin)
        self.margin = margin

    def forward(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The bias."""
        return positive + negative

    def right_inverse(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Two parts away from zero whose sum is the bias."""
        return bias.clamp(min=0) + self.margin, bias.clamp(max=0) - self.margin


@torch.no_grad()
def dale_init_(
    network: nn.Module,
    gain: float = math.sqrt(2),
    mode: Literal["fan_in", "fan_out"] = "fan_out",
    mean_std_ratio: float = 1.5,
    signs: Literal["random", "positive"] = "random",
) -> nn.Module:
    r"""Prepare a network for sign-preserving training: log-normal weights, and split biases.

    Every weight of a linear or convolutional layer is drawn by :func:`lognormal_`; every bias becomes a
    :class:`SplitBias` with parts drawn from U(0, :math:`\sqrt 2\,c`) and U(:math:`-\sqrt 2\,c`, 0), where
    :math:`c = 1 / \sqrt{fan\ in}`, or 1e-4 in layers whose weight is a vector (normalisation). Gains stay.

    Args:
        network: changed in place.
        gain: > 0; the default is that of ReLU.
        mode: whether the fan is the number of inputs or of outputs.
        mean_std_ratio: mean over standard deviation of the magnitudes, > 0.
        signs: "random", or "positive" for weights that must be.

    Returns:
        The network.

    Raises:
        ValueError: an argument out of range.
    """
    for layer in list(network.modules()):
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if not isinstance(weight, nn.Parameter):
            continue
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            lognormal_(weight, gain, mode, mean_std_ratio, signs)
        if isinstance(bias, nn.Parameter):
            bound = math.sqrt(2) * (1e-4 if weight.ndim < 2 else weight[0].numel() ** -0.5)
            parametrize.register_parametrization(layer, "bias", SplitBias())
            parts: Any = layer.parametrizations.bias  # type: ignore[union-attr]
            parts.original0.uniform_(0, bound).clamp_(min=torch.finfo(bias.dtype).tiny)
            parts.original1.uniform_(-bound, 0).clamp_(max=-torch.finfo(bias.dtype).tiny)
    return network


def eg_param_groups(model: nn.Module, gd_lr: float | None = None) -> list[dict[str, Any]]:
    """Groups for :class:`ExponentiatedGradient` and :class:`AdamWExponentiated`: what is multiplied, and what is not.

    Biases and gains (fewer than two dimensions) and whatever is all zero go to a group with ``algorithm="gd"`` and no
    weight decay; all other weights, and the parts of a :class:`SplitBias`, are trained multiplicatively. Each trainable
    parameter is in one group, once, with its name; a group that would be empty is left out.

    Args:
        model: whose parameters to sort.
        gd_lr: step of the "gd" group, >= 0, which is smaller than EG's as a rule; None: the optimizer's ``lr``.

    Returns:
        One or two groups.

    Raises:
        ValueError: the model has no trainable parameters.
    """
    lists = [module for module in model.modules() if isinstance(module, parametrize.ParametrizationList)]
    parts = {id(p) for module in lists if isinstance(module[0], SplitBias) for p in module.parameters()}
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"eg": [], "gd": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            multiplied = id(p) in parts or (p.ndim >= 2 and (p.is_meta or bool(p.detach().any())))
            groups["eg" if multiplied else "gd"].append((name, p))
    if not groups["eg"] and not groups["gd"]:
        raise ValueError(f"model has no trainable parameters: {type(model).__name__}")
    settings = {"eg": {}, "gd": {"weight_decay": 0.0} | ({} if gd_lr is None else {"lr": gd_lr})}
    return [{"params": named, "algorithm": key, **settings[key]} for key, named in groups.items() if named]
