"""How fair is a coin? The tutorial of the paper, with an exact answer."""

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Beta, Independent

from lit_methods.batches import ObservationBatch
from lit_methods.vi.programmable.programs import observe, sample


class CoinModel(nn.Module):
    """``theta ~ Beta(a, b)``; each flip in ``batch.values``, ``(batch, flips)``, is heads with probability ``theta``.

    Args:
        heads: a > 0.
        tails: b > 0.
    """

    def __init__(self, heads: float = 10.0, tails: float = 10.0) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("tails", tails)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        self.heads = heads
        self.tails = tails

    def forward(self, batch: ObservationBatch) -> None:
        """One run."""
        theta = sample("theta", Beta(self.heads, self.tails))
        flips = Bernoulli(theta.unsqueeze(-1).expand(*theta.shape, batch.values.shape[-1]))
        observe("flips", Independent(flips, 1), batch.values)


class BetaGuide(nn.Module):
    """``theta ~ Beta``, with logarithms of both parameters to be learned.

    Args:
        heads: where the first begins, > 0.
        tails: where the second begins, > 0.
    """

    def __init__(self, heads: float = 2.0, tails: float = 2.0) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("tails", tails)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        self.log_heads = nn.Parameter(torch.tensor(heads).log())
        self.log_tails = nn.Parameter(torch.tensor(tails).log())

    def forward(self, batch: ObservationBatch) -> Tensor:
        """One run."""
        return sample("theta", Beta(self.log_heads.exp(), self.log_tails.exp()))
