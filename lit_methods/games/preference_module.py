"""The preference game of :mod:`lit_methods.games.preference` as a LightningModule: four algorithms side by side."""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_methods.games.preference import (
    exploitability,
    nash_md_iteration,
    preference_iteration,
    regularized_nash,
)
from lit_methods.lr_find import refuse_lr_finder
from lit_methods.precision import load_unrounded

METHODS = ("nash_mp", "nash_prox", "self_play", "nash_md")


class PreferenceGame(L.LightningModule):
    """Runs Nash-MP, Nash Prox, regularised self-play and Nash-MD on one game and logs how far each is from ``pi*``.

    One training batch is two preference queries: one iteration of Nash-MP, two of self-play and of Nash-MD (Nash Prox
    solves its inner problem exactly instead). Logged per method: ``train/kl/<method>`` is ``KL(pi* | pi)``,
    ``train/exploitability/<method>`` the gain of a best answer; ``train/kl/bound`` is the guarantee
    ``(1 + 2 beta)^(-N / 2) KL(pi* | ref)`` of Nash-MP after ``N`` queries. Iterates are buffers in float64.

    Args:
        preferences: the matrix ``P``; row ``i``, column ``j`` is the probability that ``i`` is preferred to ``j``.
        reference: the reference policy, positive; uniform when left out.
        beta: strength of the KL regularisation, positive.
        eta: step size of all but Nash-MD; default ``2 * beta``.
        nash_md_eta: step size of Nash-MD, in ``(0, 1 / beta]``.
        num_iterations: batches per epoch of the built-in dataloader.
    """

    pref: Tensor
    log_ref: Tensor
    log_pi: Tensor
    equilibrium: Tensor
    start_kl: Tensor
    num_queries: Tensor

    def __init__(
        self,
        preferences: list[list[float]],
        reference: list[float] | None = None,
        beta: float = 0.01,
        eta: float | None = None,
        nash_md_eta: float = 0.5,
        num_iterations: int = 200,
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        self.save_hyperparameters()
        self.automatic_optimization = False
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta must be > 0 and finite, got {beta}")
        self.beta = beta
        self.eta = 2.0 * beta if eta is None else eta
        if not self.eta > 0:
            raise ValueError(f"eta={self.eta} must be positive")
        if not 0 < nash_md_eta * beta <= 1:
            raise ValueError(f"nash_md_eta={nash_md_eta} must be in (0, 1 / beta] = (0, {1 / beta}]")
        self.nash_md_eta = nash_md_eta
        self.num_iterations = num_iterations
        pref = torch.tensor(preferences, dtype=torch.float64)
        weights = torch.ones(len(preferences)) if reference is None else torch.tensor(reference)
        log_ref = (weights.double() / weights.double().sum()).log()
        equilibrium = regularized_nash(pref, log_ref, beta)
        self.register_buffer("pref", pref)
        self.register_buffer("log_ref", log_ref)
        self.register_buffer("equilibrium", equilibrium)
        self.register_buffer("log_pi", log_ref.repeat(len(METHODS), 1))
        self.register_buffer("start_kl", self._kl(log_ref))
        self.register_buffer("num_queries", torch.zeros((), dtype=torch.int64))

    def _kl(self, log_pi: Tensor) -> Tensor:
        return (self.equilibrium.exp() * (self.equilibrium - log_pi)).sum(-1)

    def blocks(self) -> list[Tensor]:
        """Both players' equilibrium, for :func:`~lit_methods.games.certify`: logits minus that of the last answer."""
        logits = self.equilibrium[:-1] - self.equilibrium[-1]
        return [logits, logits.clone()]

    def losses(self, *blocks: Tensor) -> list[Tensor]:
        """What two players of the regularised game minimise: ``beta KL(pi_i | ref) - P(pi_i preferred to pi_j)``."""
        first, second = (torch.cat([block, block.new_zeros(1)]).log_softmax(0) for block in blocks)
        wins = first.exp() @ self.pref @ second.exp()
        distances = [self.beta * (log_pi.exp() * (log_pi - self.log_ref)).sum() for log_pi in (first, second)]
        return [distances[0] - wins, distances[1] - (1 - wins)]

    def on_train_start(self) -> None:
        """Refuse Lightning's search for a learning rate."""
        refuse_lr_finder(self)

    def train_dataloader(self) -> DataLoader:
        """A loader of ``num_iterations`` indices: the game needs no data."""
        return DataLoader(range(self.num_iterations))  # type: ignore[arg-type]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Two preference queries for every method."""
        pref, log_ref, beta = self.pref, self.log_ref, self.beta
        nash_mp, nash_prox, self_play, nash_md = self.log_pi
        nash_mp = preference_iteration(pref, nash_mp, log_ref, beta, self.eta, 2)
        nash_prox = preference_iteration(pref, nash_prox, log_ref, beta, self.eta, None)
        for _ in range(2):
            self_play = preference_iteration(pref, self_play, log_ref, beta, self.eta, 1)
            nash_md = nash_md_iteration(pref, nash_md, log_ref, beta, self.nash_md_eta)
        self.log_pi.copy_(torch.stack([nash_mp, nash_prox, self_play, nash_md]))
        self.num_queries += 2
        bound = (1.0 + 2.0 * beta) ** (-self.num_queries.double() / 2) * self.start_kl
        gaps = exploitability(pref, self.log_pi, log_ref, beta)
        self.log("train/kl/bound", bound)
        for name, kl, gap in zip(METHODS, self._kl(self.log_pi), gaps, strict=True):
            self.log(f"train/kl/{name}", kl.clamp(min=0.0))
            self.log(f"train/exploitability/{name}", gap.clamp(min=0.0))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The last iterates as probabilities, ``(4, n)``, in the order of ``METHODS``."""
        return self.log_pi.exp()

    def configure_optimizers(self) -> None:
        """Nothing to optimise by gradient."""
