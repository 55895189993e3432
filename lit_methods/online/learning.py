"""Online convex optimisation as a LightningModule, and as a plain loop."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_methods.batches import OnlineRound
from lit_methods.hyperparameters import live_arguments
from lit_methods.metrics import DynamicRegret, GradientVariation, PathLength, StaticRegret
from lit_methods.metrics.online_losses import LOSSES, OnlineLoss, sample_gradients, sample_losses
from lit_methods.optim import Ball, OptimisticOMD
from lit_methods.precision import load_unrounded

__all__ = ["OnlineLearning", "run_online"]


class OnlineLearning(LightningModule):
    """Plays a point against one convex loss a batch, and keeps the score.

    A batch is a round: the loss is seen at the point that was played before it, as ``train/loss``. Any optimizer over
    the one parameter ``point`` is a learner; constraints are the optimizer's. Give the Trainer
    ``limit_train_batches`` (or the datamodule ``rounds``) = T, one epoch, and ``val_check_interval`` for how often the
    score is logged: ``val/regret`` against the best fixed point of the ball so far, ``val/dynamic_regret`` against the
    comparators, ``val/gradient_variation`` and ``val/path_length`` (all sums over rounds), and ``val/loss``, that of
    the datamodule's evaluation round. Testing logs the same under ``test/``.

    Under several ranks each draws losses of its own, and regrets are sums over the losses of all ranks.

    Args:
        dim: coordinates of the point.
        loss: "linear", "quadratic", "least_squares", "logistic", "hinge" or "abs".
        radius: of the ball that the regret's comparator lives in, > 0; ``inf`` for none (not with ``linear``).
        optimizer: builds the learner; default optimistic mirror descent on the ball of radius 1.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        dim: int,
        loss: OnlineLoss = "linear",
        radius: float = 1.0,
        optimizer: OptimizerCallable = lambda params: OptimisticOMD(params, lr=2.0, constraint=Ball(1.0)),
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if not radius > 0:
            raise ValueError(f"radius must be > 0, got {radius}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.loss: OnlineLoss = loss
        self.optimizer = optimizer
        self.point = nn.Parameter(torch.zeros(dim))
        self.regret = StaticRegret(loss, dim, radius)
        self.dynamic_regret = DynamicRegret()
        self.gradient_variation = GradientVariation(dim)
        self.path_length = PathLength(dim)
        self._scored = -1

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``<features, point>``, ``(samples,)``."""
        return features @ self.point

    def training_step(self, batch: OnlineRound, batch_idx: int) -> Tensor:
        """The round's loss at the played point."""
        losses = sample_losses(self.loss, self.point, batch.features, batch.targets)
        if self._scored != self.global_step:  # some learners look at the loss several times a round
            self._scored = self.global_step
            best = sample_losses(self.loss, batch.comparator, batch.features, batch.targets)
            self.regret.update(losses.detach(), batch.features, batch.targets)
            self.dynamic_regret.update(losses.detach(), best)
            self.path_length.update(batch.comparator)
            self.log("train/loss", losses.detach().mean(), batch_size=1)
        return losses.mean()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Follow the gradients that the learner sees."""
        if self.point.grad is not None:
            self.gradient_variation.update(self.point.grad)

    def validation_step(self, batch: OnlineRound, batch_idx: int) -> None:
        """Log the score so far."""
        self._evaluate(batch, "val")

    def test_step(self, batch: OnlineRound, batch_idx: int) -> None:
        """Log the score so far."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: OnlineRound, batch_idx: int) -> Tensor:
        """Scores of the samples, ``(samples,)``."""
        return self(batch.features)

    def configure_optimizers(self) -> Optimizer:
        """The injected learner."""
        return self.optimizer(self.parameters())

    def _evaluate(self, batch: OnlineRound, stage: str) -> None:
        losses = sample_losses(self.loss, self.point, batch.features, batch.targets)
        self.log(f"{stage}/loss", losses.mean(), sync_dist=True, batch_size=1)
        for name in ("regret", "dynamic_regret", "gradient_variation", "path_length"):
            metric = getattr(self, name)
            if metric.update_called or float(metric.total) != 0:
                value = metric.compute().to(torch.float32)  # the same on every rank
                self.log(f"{stage}/{name}", value, sync_dist=True, batch_size=1)


class OnlineTrace(NamedTuple):
    """What :func:`run_online` saw; T rounds.

    Attributes:
        points: played in each round, ``(T, dim)``.
        losses: of each round, ``(T,)``.
        gradient_variation: ``sum ||g_t - g_{t-1}||^2`` with ``g_0 = 0``, a scalar.
    """

    points: Tensor
    losses: Tensor
    gradient_variation: Tensor

    def regret(self, loss: OnlineLoss, rounds: OnlineRound, radius: float = math.inf, upto: int | None = None) -> float:
        """Static regret of the first ``upto`` rounds (all, when None) against the ball's best point."""
        metric = StaticRegret(loss, self.points.shape[1], radius)
        played = self.points[:upto, None]
        features, targets = rounds.features[:upto], rounds.targets[:upto]
        metric.update(sample_losses(loss, played, features, targets), features, targets)
        return float(metric.compute())

    def dynamic_regret(self, loss: OnlineLoss, rounds: OnlineRound) -> float:
        """Regret against the rounds' comparators."""
        best = sample_losses(loss, rounds.comparator[:, None], rounds.features, rounds.targets).mean(1)
        return float((self.losses.double() - best.double()).sum())


def run_online(
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    rounds: OnlineRound,
    loss: OnlineLoss,
    start: Tensor | None = None,
) -> OnlineTrace:
    """Play all rounds of a stream in a plain loop, with closed-form gradients: for streams too fast for a Trainer.

    Args:
        optimizer: builds the learner from ``[point]``; it must not need a closure.
        rounds: every tensor with a leading dimension T, e.g. ``SEADataModule(...).stream()``.
        loss: "linear", "quadratic", "least_squares", "logistic", "hinge" or "abs".
        start: the first point, ``(dim,)``; default 0.
    """
    point = nn.Parameter(torch.zeros_like(rounds.features[0, 0]) if start is None else start.clone())
    learner = optimizer([point])
    played = []
    last = torch.zeros_like(point, requires_grad=False)
    variation = torch.zeros((), dtype=torch.float64, device=point.device)
    for features, targets in zip(rounds.features, rounds.targets, strict=True):
        x = point.detach().clone()
        gradient = sample_gradients(loss, x, features, targets).mean(0)
        played.append(x)
        variation += (gradient - last).double().square().sum()
        last = gradient
        point.grad = gradient
        learner.step()
    points = torch.stack(played)
    losses = sample_losses(loss, points[:, None], rounds.features, rounds.targets).mean(1)
    return OnlineTrace(points, losses, variation)
