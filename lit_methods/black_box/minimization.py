"""Minimise a test function by several methods, many independent runs of each."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.hyperparameters import live_arguments
from lit_methods.lr_find import refuse_lr_finder
from lit_methods.optim.cbo.swarm import ParticleOptimizer
from lit_methods.precision import load_unrounded

__all__ = ["LandscapeMinimization"]


class LandscapeMinimization(LightningModule):
    """Minimise one function by several optimizers, with ``num_runs`` independent runs of each (manual optimization).

    Each optimizer is built once for all runs. One by loss values (:class:`~lit_methods.optim.CBO`,
    :class:`~lit_methods.optim.ConsensusHopping` and their kin) gets this module's ``num_runs`` in place of its own; any
    other one has a parameter for each run, which do not mix as long as it treats parameters apart. One batch is one
    step of every method, or its number in ``inner_steps``. The Trainer counts batches.

    Validation logs for each method: ``val/success/<method>``, the share of runs within ``tolerance`` (Euclidean) of the
    minimiser 0; ``val/distance/<method>``, the median distance; ``val/value/<method>``, the mean value.

    Args:
        objective: maps points ``(..., d)`` to values ``(...)``; its minimum is at 0.
        methods: name -> what builds the optimizer from the parameters.
        start: where all runs start, d numbers.
        num_runs: >= 1.
        inner_steps: name -> steps of a method in one batch, >= 1; 1 where it is missing.
        steps_per_epoch: batches an epoch of the built-in dataloader, >= 1.
        tolerance: see above, > 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        objective: nn.Module,
        methods: dict[str, OptimizerCallable],
        start: list[float],
        num_runs: int = 50,
        inner_steps: dict[str, int] | None = None,
        steps_per_epoch: int = 250,
        tolerance: float = 0.5,
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        if not methods:
            raise ValueError("methods must name at least one optimizer, got {}")
        if not start:
            raise ValueError("start must hold at least one coordinate, got []")
        if not all(map(math.isfinite, start)):
            raise ValueError(f"start must hold finite numbers, got {start}")
        for name, value in (("num_runs", num_runs), ("steps_per_epoch", steps_per_epoch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        inner_steps = inner_steps or {}
        if not (inner_steps.keys() <= methods.keys() and all(steps >= 1 for steps in inner_steps.values())):
            raise ValueError(f"inner_steps must give names among {list(methods)} numbers >= 1, got {inner_steps}")
        if not 0 < tolerance < math.inf:
            raise ValueError(f"tolerance must be > 0 and finite, got {tolerance}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.automatic_optimization = False
        self.objective = objective
        self.methods = methods
        self.inner_steps, self.steps_per_epoch, self.tolerance = inner_steps, steps_per_epoch, tolerance
        self.points = nn.ModuleList(nn.ParameterList(torch.tensor(start) for _ in range(num_runs)) for _ in methods)

    def on_train_start(self) -> None:
        """Refuse Lightning's search for a learning rate."""
        refuse_lr_finder(self)

    def forward(self, points: Tensor) -> Tensor:
        """Values ``(...)`` at points ``(..., d)``."""
        return self.objective(points)

    @torch.no_grad()
    def positions(self) -> dict[str, Tensor]:
        """Method -> where its runs are, ``(num_runs, d)``."""
        return {name: torch.stack(list(self._points(name))) for name in self.methods}

    def train_dataloader(self) -> StatefulDataLoader:
        """A loader of ``steps_per_epoch`` indices: a function needs no data."""
        return _indices(self.steps_per_epoch)

    def val_dataloader(self) -> StatefulDataLoader:
        """One batch: validation looks at where the runs are."""
        return _indices(1)

    test_dataloader = predict_dataloader = val_dataloader

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One step of every run of every method."""
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        counted: Any = self.optimizers()
        counted = counted[0] if isinstance(counted, list) else counted
        for i, (name, optimizer) in enumerate(zip(self.methods, optimizers, strict=True)):
            closure = self._closure(name, optimizer)
            for step in range(self.inner_steps.get(name, 1)):
                (counted if i == step == 0 else optimizer).step(closure)
            if isinstance(optimizer, ParticleOptimizer):
                (found,) = optimizer.consensus_of_runs().values()
                with torch.no_grad():
                    torch._foreach_copy_(self._points(name), list(found))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log success, distance and value of each method."""
        self._evaluate("val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the same under ``test/``."""
        self._evaluate("test")

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Method -> where its runs are, ``(num_runs, d)``."""
        return self.positions()

    def configure_optimizers(self) -> list[Optimizer]:
        """One optimizer for each method."""
        optimizers = []
        for name, build in self.methods.items():
            points = self._points(name)
            optimizer = build(points[:1])
            if isinstance(optimizer, ParticleOptimizer):
                for group in optimizer.param_groups:
                    group["num_runs"] = len(points)
            else:
                optimizer = build(points)
            optimizers.append(optimizer)
        return optimizers

    def _points(self, name: str) -> list[Tensor]:
        return list(self.points[list(self.methods).index(name)].parameters())

    def _closure(self, name: str, optimizer: Optimizer) -> Callable[[], Any]:
        if isinstance(optimizer, ParticleOptimizer):
            return lambda: self._losses
        points = self._points(name)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = self.objective(torch.stack(points)).sum()
            value.backward()
            return value

        return closure

    def _losses(self, particles: dict[str, Tensor]) -> Tensor:
        (points,) = particles.values()
        return self.objective(points)

    def _evaluate(self, stage: str) -> None:
        for name, points in self.positions().items():
            distances = torch.linalg.vector_norm(points, dim=1)
            self.log_dict(
                {
                    f"{stage}/success/{name}": (distances < self.tolerance).float().mean(),
                    f"{stage}/distance/{name}": distances.median(),
                    f"{stage}/value/{name}": self.objective(points).mean(),
                },
                batch_size=1,
                sync_dist=True,
            )


def _indices(number: int) -> StatefulDataLoader:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital'")  # torchdata 0.11 calls what torch 2.13 deprecates
        return StatefulDataLoader(range(number))
