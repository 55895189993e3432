"""The variational RNN with an encoder, which error regression is compared with."""

import torch
from torch import Tensor, nn

from lit_methods.vi.pv_rnn.network import gaussian_kl
from lit_methods.vi.pv_rnn.objective import without_gaps


class VRNN(nn.Module):
    """A recurrent network whose latents an encoder reads from each observation; it predicts by its learned prior.

    ``h`` is a GRU's state. The prior comes from ``h``, the posterior from ``h`` and features of ``x``, the output from
    ``h`` and features of ``z``; then the GRU reads both features. The loss is weighted as that of
    :class:`~lit_methods.vi.PVRNN`, so that the two can be compared.

    Source: Chung et al., "A Recurrent Latent Variable Model for Sequential Data", arXiv 1506.02216.

    Args:
        output_size: numbers in one observation, >= 1.
        hidden_size: units of the GRU, >= 1.
        latent_size: latents, >= 1.
        features: width of the feature layers, >= 1.

    Raises:
        ValueError: an argument below 1.
    """

    def __init__(self, output_size: int, hidden_size: int = 16, latent_size: int = 2, features: int = 8) -> None:
        super().__init__()
        sizes = {
            "output_size": output_size,
            "hidden_size": hidden_size,
            "latent_size": latent_size,
            "features": features,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.latent_size = latent_size
        self.x_features = nn.Sequential(nn.Linear(output_size, features), nn.ReLU())
        self.z_features = nn.Sequential(nn.Linear(latent_size, features), nn.ReLU())
        self.prior = nn.Linear(hidden_size, 2 * latent_size)
        self.encoder = nn.Linear(hidden_size + features, 2 * latent_size)
        self.decoder = nn.Linear(hidden_size + features, output_size)
        self.gru = nn.GRUCell(2 * features, hidden_size)

    def loss(self, values: Tensor, mask: Tensor | None = None, meta_prior: float = 0.01) -> Tensor:
        """``sum_t NLL_t / X + meta_prior sum_t KL_t / Z`` of each sequence, ``(batch,)``.

        Args:
            values: observations ``(batch, steps, output_size)``.
            mask: which there were, ``(batch, steps)``; a gap is filled by the prior.
            meta_prior: weight of the KL.
        """
        return self._follow(values, mask, meta_prior)[0]

    def recognise(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """State ``(batch, hidden_size)`` after the observations."""
        return self._follow(values, mask, 0.0)[1]

    def generate(self, steps: int, state: Tensor) -> Tensor:
        """How it goes on from a state, by the prior: ``(batch, steps, output_size)``."""
        found = []
        for _ in range(steps):
            mean, state = self._read(state, _sample(self.prior(state)))
            found.append(mean)
        return torch.stack(found, 1)

    def _follow(self, values: Tensor, mask: Tensor | None, meta_prior: float) -> tuple[Tensor, Tensor]:
        values, mask = without_gaps(values, mask)
        state = values.new_zeros(len(values), self.gru.hidden_size)
        total = values.new_zeros(len(values))
        for x, there in zip(values.unbind(1), mask.unbind(1), strict=True):
            prior = self.prior(state)
            posterior = self.encoder(torch.cat([state, self.x_features(x)], 1))
            mean, state = self._read(state, _sample(torch.where(there[:, None], posterior, prior)), x, there)
            nll = 0.5 * (mean - x).square().mean(1)
            kl = gaussian_kl(*posterior.chunk(2, 1), *prior.chunk(2, 1)).mean(1)
            total = total + there * (nll + meta_prior * kl)
        return total, state

    def _read(
        self, state: Tensor, z: Tensor, x: Tensor | None = None, there: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The output's mean and the next state, which reads what was observed, or else the mean."""
        features = self.z_features(z)
        mean = self.decoder(torch.cat([state, features], 1)).tanh()
        seen = mean if x is None or there is None else torch.where(there[:, None], x, mean)
        return mean, self.gru(torch.cat([self.x_features(seen), features], 1), state)


def _sample(head: Tensor) -> Tensor:
    mu, log_sigma = head.chunk(2, 1)
    return mu + log_sigma.exp() * torch.randn_like(mu)
