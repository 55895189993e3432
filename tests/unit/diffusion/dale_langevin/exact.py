"""Log-normal data, for which the multiplicative model has closed forms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_methods.diffusion import Denoiser, GeometricBrownian
from lit_methods.diffusion.processes import per_sample


def mixture_denoiser(
    process: GeometricBrownian, weights: Sequence[float], means: Sequence[float], std: float
) -> Denoiser:
    """The exact denoiser for ``log x`` from a mixture of normal distributions of one ``std``, in every dimension."""

    def net(y: Tensor, t: Tensor) -> Tensor:
        sigma = per_sample(process.sigma(t).to(y.dtype), y)
        total = sigma**2 + std**2
        logs = torch.stack(
            [torch.tensor(w).log() - (y - m) ** 2 / (2 * total) for w, m in zip(weights, means, strict=True)]
        )
        shares = logs.softmax(0)
        return sum(share * (m + std**2 / total * (y - m)) for share, m in zip(shares, means, strict=True))

    return Denoiser(net, process, "x0")


def normal_denoiser(process: GeometricBrownian, mean: float, std: float) -> Denoiser:
    """The exact denoiser for ``log x`` from one normal distribution."""
    return mixture_denoiser(process, [1.0], [mean], std)
