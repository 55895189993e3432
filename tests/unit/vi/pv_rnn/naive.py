"""The equations of PV-RNN as they are written, layer by layer and step by step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_methods.vi import PVRNN


def blocks(sizes: list[int]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def naive_step(
    network: PVRNN, h: list[Tensor], a_mu: Tensor, a_sigma: Tensor, eps: Tensor, first: bool
) -> tuple[list[Tensor], Tensor]:
    """One step of all layers, and its KL ``(batch, layers)``."""
    layers, latents = blocks(network.hidden_sizes), blocks(network.latent_sizes)
    width, units = sum(network.hidden_sizes), sum(network.latent_sizes)
    weight, bias, latent = network.weight * network.weight_mask, network.bias, network.latent
    ls_q, mu_q, mu_p, ls_p = (slice(width + i * units, width + (i + 1) * units) for i in range(4))
    d, kl, after = [x.tanh() for x in h], [], []
    for i, (own, z_part) in enumerate(zip(layers, latents, strict=True)):
        heads = [d[i] @ weight[p][z_part][:, own].T + bias[p][z_part] for p in (ls_q, mu_q, mu_p, ls_p)]
        sigma_q, m_q = (heads[0] + a_sigma[:, z_part]).exp(), (heads[1] + a_mu[:, z_part]).tanh()
        m_p, sigma_p = heads[2].tanh(), heads[3].exp()
        if first:
            m_p, sigma_p = torch.zeros_like(m_p), torch.ones_like(sigma_p)
        z = m_q + sigma_q * eps[:, z_part]
        terms = (sigma_p / sigma_q).log() + (sigma_q**2 + (m_q - m_p) ** 2) / (2 * sigma_p**2) - 0.5
        kl.append(terms.sum(1))
        drive = d[i] @ weight[own, own].T + z @ latent[own, z_part].T + bias[own]
        for j in (i - 1, i + 1):
            if 0 <= j < len(layers):
                drive = drive + d[j] @ weight[own, layers[j]].T
        tau = network.tau[own]
        after.append((1 - 1 / tau) * h[i] + drive / tau)
    return after, torch.stack(kl, 1)


def naive_posterior(
    network: PVRNN, adaptive: Tensor, eps: Tensor, state: Tensor | None = None, step: Callable[..., Any] = naive_step
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, KL of each layer, states: as :class:`PVRNNOutput` has them."""
    units = sum(network.latent_sizes)
    if state is None:
        h = [torch.zeros(len(adaptive), n, dtype=adaptive.dtype) for n in network.hidden_sizes]
    else:
        h = [state[:, part] for part in blocks(network.hidden_sizes)]
    means, kls, states = [], [], []
    for t, a in enumerate(adaptive.unbind(1)):
        h, kl = step(network, h, a[:, :units], a[:, units:], eps[t], t == 0 and state is None)
        kls.append(kl)
        states.append(torch.cat(h, 1))
        output = h[0].tanh() @ network.readout.weight.T + network.readout.bias
        means.append(output.tanh() if network.output == "tanh" else output)
    return torch.stack(means, 1), torch.stack(kls, 1), torch.stack(states, 1)
