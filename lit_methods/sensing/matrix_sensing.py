"""Over-parameterised matrix sensing: gradient descent on one factor or on two (Xiong, Ding and Du, ICLR 2024).

An unknown ``M`` of rank ``r`` is recovered from near-isotropic measurements ``y_i = <A_i, M>`` by gradient descent on
factors with ``k >= r`` columns (arXiv 2310.01769). What the paper proves, and what the recipes ``matrix_sensing/*``
show, about the squared error after ``T`` steps:

- ``X X^T``, ``k = r``: ``exp(-Omega(T))``; ``k > r``: no better than ``1/T^2``. Every superfluous eigenvalue obeys
  ``l <- l (1 - lr l)^2``, hence ``l ~ 1 / (2 lr T)``.
- ``F G^T`` with unequal initial scales, ``k > r``: ``exp(-Omega(lr alpha^2 T))``. ``F^T F - G^T G`` is conserved up to
  ``O(lr^2)`` and keeps the smallest singular value of ``F`` near the initial scale ``alpha``.
- ``F G^T`` with one extra step (:func:`~lit_methods.sensing.rebalance_factors_`, by the callback
  :class:`~lit_methods.callbacks.FactorRebalancing`): ``(1 - lr beta^2)^(2T)``, whatever ``alpha`` was.

Another optimizer is another baseline: :class:`~lit_methods.optim.ScaledGD` is free of the condition number as well.

The batch decides what is measured: :class:`~lit_methods.batches.SensingBatch` (dense ``A_i``),
:class:`~lit_methods.batches.RankOneBatch` (``a_i b_i^T``) or :class:`~lit_methods.batches.EntriesBatch` (matrix
completion; all entries: matrix factorisation); the adjoint is autograd's. Losses are means over measurements, so that
plain ``SGD`` on a full batch is the paper's gradient descent to the letter, data parallel ranks with equal shares
average to it, and mini-batches estimate it.
"""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_methods.batches import EntriesBatch, MatrixBatch, RankOneBatch, SensingBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.precision import load_unrounded

__all__ = ["AsymmetricSensing", "SymmetricSensing"]


class _Sensing(LightningModule):
    """What both parameterisations share: runs side by side from several initial scales, and recovery errors.

    Subclasses define :meth:`factors` and ``loss_factor``.
    """

    loss_factor: float

    def __init__(self, init_scales: Sequence[float], optimizer: OptimizerCallable) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        if not init_scales or not all(0 < scale < float("inf") for scale in init_scales):
            raise ValueError(f"init_scales must hold at least one number, all > 0 and finite, got {init_scales}")
        if len({f"{scale:g}" for scale in init_scales}) < len(init_scales):
            raise ValueError(f"init_scales must differ in 6 digits, since runs are logged by them, got {init_scales}")
        self.init_scales = tuple(init_scales)
        self.optimizer = optimizer

    def factors(self) -> tuple[Tensor, Tensor]:
        """Left ``(runs, rows, factor_rank)`` and right ``(runs, columns, factor_rank)`` factors."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """The recovered matrices ``(runs, rows, columns)``."""
        left, right = self.factors()
        return left @ right.mT

    def training_step(self, batch: SensingBatch | RankOneBatch | EntriesBatch, batch_idx: int) -> Tensor:
        """Sum over runs of the scaled mean squared residual; the runs' gradients do not mix."""
        residuals = batch.measure(*self.factors()) - batch.values
        losses = self.loss_factor * residuals.square().mean(-1)
        loss = losses.sum()
        self.log("train/loss", loss, batch_size=len(batch.values))
        return loss

    def validation_step(self, batch: MatrixBatch, batch_idx: int) -> None:
        """Log the squared Frobenius error of every run, and its smallest singular value of the left factor."""
        self._evaluate(batch, "val")

    def test_step(self, batch: MatrixBatch, batch_idx: int) -> None:
        """Log the same about the test matrix."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: MatrixBatch, batch_idx: int) -> Tensor:
        """The recovered matrices ``(runs, rows, columns)``."""
        return self()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The injected optimizer over the factors."""
        return self.optimizer(self.parameters())

    def _evaluate(self, batch: MatrixBatch, stage: str) -> None:
        left, recovered = self.factors()[0], self()
        if batch.matrix.shape[-2:] != recovered.shape[-2:]:
            raise ValueError(
                f"The data's matrix is {tuple(batch.matrix.shape[-2:])}, but the factors make one of "
                f"{tuple(recovered.shape[-2:])}."
            )
        errors = (recovered - batch.matrix).square().sum((-2, -1))
        smallest = torch.linalg.matrix_norm(left.float() if left.dtype == torch.bfloat16 else left, ord=-2)
        for run, scale in enumerate(self.init_scales):
            self.log(f"{stage}/error/{scale:g}", errors[run], sync_dist=True, batch_size=1)
            self.log(f"{stage}/sigma_min/{scale:g}", smallest[run], sync_dist=True, batch_size=1)
        self.log(f"{stage}/error", errors.max(), sync_dist=True, batch_size=1)


class SymmetricSensing(_Sensing):
    """Recover a symmetric positive semi-definite matrix as ``X X^T``.

    The loss is ``1/4 mean_i (<A_i, X X^T> - y_i)^2``: gradient descent is ``X <- X - lr A*A(X X^T - M) X``. Runs from
    several initial scales ``alpha`` train side by side, which costs little more than one because each pass over the
    measurements serves all. Entries of ``X`` start as ``alpha N(0, 1/size)``.

    Logs ``train/loss`` (sum over runs), and for each run ``{val,test}/error/<alpha>`` (squared Frobenius error) and
    ``{val,test}/sigma_min/<alpha>`` (of ``X``); ``{val,test}/error`` is the largest error.

    Args:
        size: number of rows and columns of the matrix.
        factor_rank: number of columns ``k`` of ``X``; above the true rank the rate is ``1/T^2``.
        init_scales: one ``alpha`` > 0 per run.
        optimizer: builds the optimizer; default gradient descent with a step of 0.1 (for a largest singular value 1).

    Raises:
        ValueError: an argument out of range; a validation or test matrix of another size, or not symmetric.
    """

    loss_factor = 0.25

    def __init__(
        self,
        size: int,
        factor_rank: int,
        init_scales: Sequence[float] = (0.1,),
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1),
    ) -> None:
        super().__init__(init_scales, optimizer)
        self.save_hyperparameters(ignore=live_arguments(locals()))
        _check_sizes(size=size, factor_rank=factor_rank)
        self.factor = nn.Parameter(_gaussian(init_scales, size, factor_rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        """``X`` twice, ``(runs, size, factor_rank)``."""
        return self.factor, self.factor

    def _evaluate(self, batch: MatrixBatch, stage: str) -> None:
        super()._evaluate(batch, stage)
        if not torch.allclose(batch.matrix, batch.matrix.mT, rtol=1e-3, atol=1e-5):
            raise ValueError("The data's matrix is not symmetric and cannot be X X^T: use AsymmetricSensing.")


class AsymmetricSensing(_Sensing):
    """Recover any matrix as ``F G^T``.

    The loss is ``1/2 mean_i (<A_i, F G^T> - y_i)^2``: gradient descent is ``F <- F - lr R G`` and ``G <- G - lr R^T F``
    at once, with ``R = A*A(F G^T - M)``. Entries start as ``F = alpha N(0, 1/rows)`` and ``G = alpha / imbalance
    N(0, 1/columns)``; the linear rate needs the imbalance. Runs from several ``alpha`` train side by side.

    Logs what :class:`SymmetricSensing` logs (``sigma_min`` is that of ``F``), and ``{val,test}/imbalance/<alpha>``, the
    Frobenius norm of ``F^T F - G^T G``.

    Args:
        rows: number of rows of the matrix and of ``F``.
        columns: number of columns of the matrix, and rows of ``G``.
        factor_rank: number of columns ``k`` of ``F`` and of ``G``.
        init_scales: one ``alpha`` > 0 per run.
        imbalance: how much smaller ``G`` starts, > 0; the paper's experiments have 3.
        optimizer: builds the optimizer; default gradient descent with a step of 0.1 (for a largest singular value 1).

    Raises:
        ValueError: an argument out of range; a validation or test matrix of another size.
    """

    loss_factor = 0.5

    def __init__(
        self,
        rows: int,
        columns: int,
        factor_rank: int,
        init_scales: Sequence[float] = (0.1,),
        imbalance: float = 3.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1),
    ) -> None:
        super().__init__(init_scales, optimizer)
        self.save_hyperparameters(ignore=live_arguments(locals()))
        _check_sizes(rows=rows, columns=columns, factor_rank=factor_rank)
        if not 0 < imbalance < float("inf"):
            raise ValueError(f"imbalance must be > 0 and finite, got {imbalance}")
        self.left = nn.Parameter(_gaussian(init_scales, rows, factor_rank))
        self.right = nn.Parameter(_gaussian(init_scales, columns, factor_rank) / imbalance)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``F`` ``(runs, rows, factor_rank)`` and ``G`` ``(runs, columns, factor_rank)``."""
        return self.left, self.right

    def _evaluate(self, batch: MatrixBatch, stage: str) -> None:
        super()._evaluate(batch, stage)
        imbalances = (self.left.mT @ self.left - self.right.mT @ self.right).square().sum((-2, -1)).sqrt()
        for scale, imbalance in zip(self.init_scales, imbalances, strict=True):
            self.log(f"{stage}/imbalance/{scale:g}", imbalance, sync_dist=True, batch_size=1)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _gaussian(scales: Sequence[float], rows: int, columns: int) -> Tensor:
    return torch.tensor(scales)[:, None, None] * torch.randn(len(scales), rows, columns) / rows**0.5
