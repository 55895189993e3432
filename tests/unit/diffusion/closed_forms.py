"""Gaussian data, for which every quantity of a diffusion model has a closed form."""

import torch
from torch import Tensor

from lit_methods.diffusion import Denoiser, Process
from lit_methods.diffusion.processes import as_process

PROCESSES = ["vp_linear", "vp_cosine", "sub_vp", "ve", "edm", "fm", "trigflow"]
MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
STD = torch.tensor([0.5, 1.5], dtype=torch.float64)
POINTS = torch.tensor([[0.3, -1.2], [1.5, 0.4], [-0.7, 2.0]], dtype=torch.float64)


def gaussian_denoiser(process: str | Process, mean: Tensor = MEAN, std: Tensor = STD) -> Denoiser:
    path = as_process(process)

    def net(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t)[:, None].to(x.dtype), path.sigma(t)[:, None].to(x.dtype)
        m, c = mean.to(x.dtype), std.to(x.dtype)
        return m + alpha * c**2 / (alpha**2 * c**2 + sigma**2) * (x - alpha * m)

    return Denoiser(net, path, "x0")


def gaussian_flow_map(
    process: Process, x: Tensor, t: float, s: float, mean: Tensor = MEAN, std: Tensor = STD
) -> Tensor:
    """Where the probability-flow ODE carries ``x`` from time ``t`` to time ``s``."""
    alpha_t, sigma_t = process.alpha(t), process.sigma(t)
    alpha_s, sigma_s = process.alpha(s), process.sigma(s)
    ratio = ((alpha_s * std) ** 2 + sigma_s**2).sqrt() / ((alpha_t * std) ** 2 + sigma_t**2).sqrt()
    return alpha_s * mean + ratio * (x - alpha_t * mean)
