"""What the modules of this family share: data in, reproducible noise, losses logged, samples out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lit_methods.batches import SupervisedBatch
from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.processes import Generators
from lit_methods.diffusion.streams import check_seed, stream
from lit_methods.precision import load_unrounded


class GenerativeModule(LightningModule, ABC):
    """A module that learns from ``(x, y)`` batches to make ``x``, told of ``y`` if it has a conditioning.

    Whatever is random in a training step depends on (seed, rank, step), in an evaluation on (seed, rank, batch): ranks
    differ though they share a seed, and a resumed run repeats nothing. Subclasses say :meth:`loss` and :meth:`sample`,
    and call :meth:`begin` in their constructor.
    """

    denoiser: Denoiser

    def begin(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None, seed: int | None) -> None:
        """Set what all subclasses have."""
        self.register_load_state_dict_pre_hook(load_unrounded)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.seed = check_seed(seed)
        self.steps_drawn = 0
        self.sample_shape: list[int] | None = None

    @abstractmethod
    def loss(self, x0: Tensor, cond: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """Mean loss of data at random times, ``()``."""

    @abstractmethod
    def sample(
        self, n: int, cond: Any = None, *, generator: Generators = None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """Make samples."""

    def on_first_batch(self, x: Tensor) -> None:
        """Look at the data once, when training begins."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Tensor | None = None) -> Tensor:
        """The network's own prediction for noisy ``x`` at times ``t``."""
        return self.denoiser(x, t, cond, s)

    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        x, cond = self._split(batch)
        if self.sample_shape is None:
            self.sample_shape = list(x.shape[1:])
            self.on_first_batch(x)
        generator = self._stream("train", self.steps_drawn)
        self.steps_drawn += 1
        if cond is not None and self.denoiser.conditioning is not None:
            self.denoiser.conditioning.check(cond)
            cond = self.denoiser.conditioning.drop(cond, generator)
        loss = self.loss(x, cond, generator)
        self.log("train/loss", loss, batch_size=len(x))
        return loss

    def validation_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Log the loss."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Log the loss."""
        self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: SupervisedBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """A sample for each row of the batch."""
        x, cond = self._split(batch)
        generator = self._stream("predict", dataloader_idx, batch_idx)
        return self.sample(len(x), cond, generator=generator, shape=x.shape[1:])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The injected optimizer, with the injected schedule if there is one."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what random numbers depend on, and the shape of a sample."""
        checkpoint["diffusion"] = {
            "seed": self.seed,
            "steps_drawn": self.steps_drawn,
            "sample_shape": self.sample_shape,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the saved seed."""
        for name, value in checkpoint["diffusion"].items():
            setattr(self, name, value)

    def known_shape(self, n: int, shape: Sequence[int] | None) -> list[int]:
        """Shape of ``n`` samples.

        Raises:
            ValueError: ``n`` is below 1, or the shape of one is not known.
        """
        shape = shape if shape is not None else self.sample_shape
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}")
        if shape is None:
            raise ValueError("shape must be given before the model was trained, got None")
        return [n, *shape]

    def _split(self, batch: SupervisedBatch) -> tuple[Tensor, Any]:
        return batch[0], None if self.denoiser.conditioning is None else batch[1]

    def _stream(self, *place: int | str) -> torch.Generator:
        rank = 0 if self._trainer is None else self.trainer.global_rank
        return stream(self.device, self.seed, rank, *place)

    def _evaluate(self, batch: SupervisedBatch, batch_idx: int, stage: str) -> None:
        x, cond = self._split(batch)
        loss = self.loss(x, cond, self._stream(stage, batch_idx))
        self.log(f"{stage}/loss", loss, batch_size=len(x), sync_dist=True)
