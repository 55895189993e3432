"""Two-player zero-sum matrix games, played by gradients: where optimism converges and plain descent-ascent does not."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lit_methods.hyperparameters import live_arguments
from lit_methods.optim import OptimisticOMD
from lit_methods.precision import load_unrounded

__all__ = ["MatrixGame"]


class MatrixGame(LightningModule):
    """``min_x max_y x' A y``, both players learning at once from their own gradients.

    Without ``mixed``, x and y are free vectors that start at 1, and ``train/gap/distance`` is the norm of (x, y), the
    distance to the equilibrium at 0 (the only one when ``A`` has full rank). With ``mixed`` they are mixed strategies,
    which the optimizer must keep on the simplex (``mirror="entropy"``), and ``train/gap/duality`` is what the players
    could gain together by best responses, 0 at an equilibrium.

    One optimizer has both players: two groups, the second with ``maximize``. One batch is one round.

    Args:
        payoff: the matrix A, what the row player x pays.
        mixed: players have mixed strategies.
        x: the row player's start; default 1 everywhere, or the uniform strategy.
        y: the column player's start, likewise.
        rounds: batches an epoch of the built-in dataloader.
        optimizer: builds the optimizer from the two groups.

    Raises:
        ValueError: an argument out of range.
    """

    payoff: Tensor

    def __init__(
        self,
        payoff: list[list[float]],
        mixed: bool = False,
        x: list[float] | None = None,
        y: list[float] | None = None,
        rounds: int = 1000,
        optimizer: OptimizerCallable = lambda params: OptimisticOMD(params, lr=0.1, step_size="constant"),
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        matrix = torch.tensor(payoff, dtype=torch.float64)
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise ValueError(f"payoff must be a matrix, got shape {tuple(matrix.shape)}")
        if not matrix.isfinite().all():
            raise ValueError(f"payoff must hold finite numbers, got {payoff}")
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.register_buffer("payoff", matrix)
        self.x = nn.Parameter(_start("x", x, matrix.shape[0], mixed))
        self.y = nn.Parameter(_start("y", y, matrix.shape[1], mixed))
        self.mixed = mixed
        self.rounds = rounds
        self.optimizer = optimizer

    def forward(self) -> Tensor:
        """What the row player pays, a scalar."""
        return self.x @ self.payoff.to(self.x) @ self.y

    def blocks(self) -> list[Tensor]:
        """Where the players are, for :func:`~lit_methods.games.certify`."""
        return [self.x.detach().clone(), self.y.detach().clone()]

    def losses(self, *blocks: Tensor) -> list[Tensor]:
        """What each player minimises: the payoff, and minus the payoff."""
        x, y = blocks
        paid = x @ self.payoff.to(x) @ y
        return [paid, -paid]

    def train_dataloader(self) -> DataLoader:
        """A loader of ``rounds`` indices: the game needs no data."""
        return DataLoader(range(self.rounds))  # type: ignore[arg-type]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The payoff, whose gradient both players use."""
        with torch.no_grad():
            payoff = self.payoff.to(self.x)
            if self.mixed:
                gap = (payoff.T @ self.x).max() - (payoff @ self.y).min()
                self.log("train/gap/duality", gap.clamp(min=0))
            else:
                self.log("train/gap/distance", (self.x @ self.x + self.y @ self.y).sqrt())
        return self()

    def configure_optimizers(self) -> Optimizer:
        """The injected optimizer; the second group ascends."""
        groups = [{"params": [self.x]}, {"params": [self.y], "maximize": True}]
        return self.optimizer(groups)


def _start(name: str, values: list[float] | None, size: int, mixed: bool) -> Tensor:
    start = torch.full((size,), 1 / size if mixed else 1.0) if values is None else torch.tensor(values)
    if len(start) != size:
        raise ValueError(f"{name} must have {size} entries, got {len(start)}")
    if not start.isfinite().all():
        raise ValueError(f"{name} must hold finite numbers, got {values}")
    if mixed and not (bool((start >= 0).all()) and abs(float(start.sum()) - 1) < 1e-5):
        raise ValueError(f"{name} must be a probability vector in a mixed game, got {values}")
    return start
