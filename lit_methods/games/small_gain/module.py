"""Simultaneous gradient play of a differentiable game, watched by distances to its equilibrium."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lit_methods.hyperparameters import live_arguments
from lit_methods.lr_find import refuse_lr_finder
from lit_methods.optim import PseudoGradientRK4
from lit_methods.optim.pseudo_gradient_rk4 import set_own_gradients
from lit_methods.precision import load_unrounded

__all__ = ["GameModule"]


class GameModule(LightningModule):
    """All players descend their own losses at once, each by the gradient of its own block.

    One batch is one round. With ``equilibrium`` it logs ``train/distance/euclidean``, ``|x - x*|``, and
    ``train/distance/weighted``, ``sqrt(sum_i w_i |x_i - x*_i|^2)``: the norm in which a certified game contracts (the
    callback :class:`~lit_methods.callbacks.SmallGainCertification` sets the weights). With natural gradients it logs
    ``train/distance/divergence`` instead, ``sum_i w_i KL(pi*_i | pi_i)``. The losses are ``train/loss/<player>``.

    Args:
        game: losses of the players' blocks: :class:`QuadraticGame`, :class:`MarkovGame`, your own.
        start: where the players begin, one list of numbers for each.
        equilibrium: likewise, where known.
        geometry: ``"euclidean"``, or ``"natural"``: gradients are multiplied by the inverse of the game's Fisher matrix
            (``game.fisher_metric``).
        rounds: batches an epoch of the built-in dataloader, >= 1.
        optimizer: builds the optimizer from one group for each player: SGD is the Euler method,
            :class:`~lit_methods.optim.PseudoGradientRK4` that of Runge and Kutta.

    Raises:
        ValueError: an argument out of range, or blocks that do not fit.
    """

    weights: Tensor

    def __init__(
        self,
        game: nn.Module,
        start: list[list[float]],
        equilibrium: list[list[float]] | None = None,
        geometry: str = "euclidean",
        rounds: int = 1000,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1e-2),
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        if len(start) < 2:
            raise ValueError(f"start must have 2 or more players, got {len(start)}")
        if equilibrium is not None and [len(x) for x in equilibrium] != [len(x) for x in start]:
            raise ValueError(
                f"equilibrium must have blocks of {[len(x) for x in start]}, got {[len(x) for x in equilibrium]}"
            )
        if geometry not in ("euclidean", "natural"):
            raise ValueError(f"geometry must be 'euclidean' or 'natural', got {geometry!r}")
        if geometry == "natural" and not hasattr(game, "fisher_metric"):
            raise ValueError(f"geometry must be 'euclidean' for {type(game).__name__}, which has no fisher_metric")
        if rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {rounds}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.automatic_optimization = False
        self.game: Any = game
        self.players = nn.ParameterList([torch.tensor(x, dtype=torch.float64) for x in start])
        self.equilibrium = equilibrium
        self.geometry = geometry
        self.rounds = rounds
        self.optimizer = optimizer
        self.register_buffer("weights", torch.ones(len(start), dtype=torch.float64))

    def blocks(self) -> list[Tensor]:
        """Where a certificate is asked: the equilibrium, or where the players are."""
        if self.equilibrium is None:
            return [x.detach().clone() for x in self.players]
        return [torch.tensor(x, dtype=torch.float64) for x in self.equilibrium]

    def losses(self, *blocks: Tensor) -> Sequence[Tensor]:
        """The game's losses."""
        found: Sequence[Tensor] = self.game.losses(*blocks)
        return found

    def forward(self) -> Tensor:
        """The players' losses ``(N,)`` where they are."""
        return torch.stack(list(self.losses(*self.players)))

    def train_dataloader(self) -> DataLoader:
        """A loader of ``rounds`` indices: the game needs no data."""
        return DataLoader(range(self.rounds))  # type: ignore[arg-type]

    def on_train_start(self) -> None:
        """Refuse Lightning's search for a learning rate."""
        refuse_lr_finder(self)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One round."""
        self._log_distances()
        wrapper: Any = self.optimizers()
        if isinstance(wrapper.optimizer, PseudoGradientRK4):
            losses = wrapper.step(self._evaluate)
        else:
            losses = self._evaluate()
            wrapper.step()
        for i, loss in enumerate(losses):
            self.log(f"train/loss/{i}", loss)

    def configure_optimizers(self) -> Optimizer:
        """The injected optimizer, with one group for each player."""
        return self.optimizer([{"params": [x]} for x in self.players])

    def _evaluate(self) -> Tensor:
        """The losses, with each player's own gradient in ``.grad``."""
        self.zero_grad()
        with torch.enable_grad():
            losses = self.losses(*self.players)
            set_own_gradients(losses, [[x] for x in self.players])
        if self.geometry == "natural":
            with torch.no_grad():
                factors = self.game.fisher_metric(*self.players)
                for x, factor in zip(self.players, factors, strict=True):
                    assert x.grad is not None
                    x.grad = factor @ (factor.T @ x.grad)
        return torch.stack([loss.detach() for loss in losses])

    @torch.no_grad()
    def _log_distances(self) -> None:
        if self.equilibrium is None:
            return
        if self.geometry == "natural":
            divergence = self.game.divergence(self.blocks(), list(self.players))
            self.log("train/distance/divergence", (self.weights.to(divergence) * divergence).sum().clamp(min=0.0))
            return
        squares = torch.stack([(x - y.to(x)).square().sum() for x, y in zip(self.players, self.blocks(), strict=True)])
        self.log("train/distance/euclidean", squares.sum().sqrt())
        self.log("train/distance/weighted", (self.weights.to(squares) * squares).sum().sqrt())
