"""Bayesian linear regression, with minibatches: all data share the latent variables."""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal

from lit_methods.batches import SupervisedBatch
from lit_methods.vi.programmable.programs import observe, sample


class RegressionModel(nn.Module):
    """``w ~ N(0, prior_std I)``; ``y = w . (x, 1) + N(0, noise)``, for ``batch.y`` of shape ``(batch, 1)``.

    Args:
        num_features: of x, >= 1.
        num_data: of the whole training set, >= 1: a batch counts ``num_data / batch`` times.
        prior_std: of the weights, > 0.
        noise: standard deviation of y, > 0.
    """

    def __init__(self, num_features: int, num_data: int, prior_std: float = 1.0, noise: float = 0.7) -> None:
        super().__init__()
        for name, value in (("num_features", num_features), ("num_data", num_data)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name, number in (("prior_std", prior_std), ("noise", noise)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {number}")
        self.num_features = num_features
        self.num_data = num_data
        self.prior_std = prior_std
        self.noise = noise

    def forward(self, batch: SupervisedBatch) -> None:
        """One run."""
        zeros = batch.x.new_zeros(self.num_features + 1)
        w = sample("w", Independent(Normal(zeros, self.prior_std), 1))
        mean = w[..., :-1] @ batch.x.flatten(1).T + w[..., -1:]
        scale = self.num_data / len(batch.x) if self.training else 1.0
        observe("y", Independent(Normal(mean, self.noise), 1), batch.y.flatten(), scale=scale)

    def posterior(self, data: SupervisedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Exact posterior mean and covariance of w, and the log-evidence, for all data at once; float64."""
        x = torch.cat([data.x.flatten(1), data.x.new_ones(len(data.x), 1)], 1).double()
        y = data.y.flatten().double()
        eye = torch.eye(x.shape[1], dtype=x.dtype)
        covariance = torch.linalg.inv(x.T @ x / self.noise**2 + eye / self.prior_std**2)
        marginal = self.prior_std**2 * x @ x.T + self.noise**2 * torch.eye(len(x), dtype=x.dtype)
        evidence = MultivariateNormal(torch.zeros_like(y), marginal).log_prob(y)
        return covariance @ x.T @ y / self.noise**2, covariance, evidence


class WeightGuide(nn.Module):
    """``w`` is normal with any covariance, by its Cholesky factor.

    Args:
        num_features: of x, >= 1.
        std: standard deviation of weights at first, > 0.
    """

    def __init__(self, num_features: int, std: float = 0.1) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be >= 1, got {num_features}")
        if not 0 < std < math.inf:
            raise ValueError(f"std must be > 0 and finite, got {std}")
        self.mean = nn.Parameter(torch.zeros(num_features + 1))
        self.log_std = nn.Parameter(torch.full((num_features + 1,), math.log(std)))
        self.lower = nn.Parameter(torch.zeros(num_features + 1, num_features + 1))

    def forward(self, batch: SupervisedBatch) -> None:
        """One run."""
        std = self.log_std.exp()
        factor = (self.lower.tril(-1) + torch.eye(len(std), dtype=std.dtype, device=std.device)) * std[:, None]
        sample("w", MultivariateNormal(self.mean, scale_tril=factor, validate_args=False))
