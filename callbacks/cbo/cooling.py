"""Colder and fewer particles as training goes on."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_methods.optim import CBO


class CBOCooling(Callback):
    """Cool the particles of every :class:`~lit_methods.optim.CBO` of the Trainer, as arXiv 2306.09778's code does.

    At the end of every ``every_n_epochs``-th epoch, for the e-th time: ``sigma`` becomes
    ``sigma log2(e + 1) / log2(e + 2)``, ``alpha`` becomes ``alpha_factor * alpha``, and with ``reduction > 0`` the
    number of particles becomes the next multiple of ``particle_batch_size`` above ``f N``, with
    ``f = clip(1 + reduction (S - S_before) / S_before, 1 - reduction, 1)`` where S is the norm of the particles'
    variance. Cooling suits the amount of data seen: MNIST has 1000 batches of 60 an epoch, smaller sets need larger
    ``every_n_epochs``.

    Other optimizers are left alone.

    Args:
        every_n_epochs: >= 1.
        alpha_factor: >= 1. For a factor at every step there is the optimizer's own ``alpha_growth``.
        reduction: in [0, 1); the authors' is 0.2, 0 keeps all particles.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, every_n_epochs: int = 1, alpha_factor: float = 2.0, reduction: float = 0.0) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        if not 1 <= alpha_factor < math.inf:
            raise ValueError(f"alpha_factor must be >= 1 and finite, got {alpha_factor}")
        if not 0 <= reduction < 1:
            raise ValueError(f"reduction must be in [0, 1), got {reduction}")
        self.every_n_epochs = every_n_epochs
        self.alpha_factor = alpha_factor
        self.reduction = reduction
        self.coolings = 0
        self.spreads: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """How often it cooled, and each optimizer's spread at that time."""
        return {"coolings": self.coolings, "spreads": list(self.spreads)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.coolings, self.spreads = state_dict["coolings"], list(state_dict["spreads"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the first spread."""
        if self.reduction and not self.spreads:
            self.spreads = [optimizer.spread() for optimizer in _swarms(trainer)]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cool."""
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        self.coolings += 1
        e = self.coolings
        for i, optimizer in enumerate(_swarms(trainer)):
            for group in optimizer.param_groups:
                group["sigma"] *= math.log2(e + 1) / math.log2(e + 2)
                group["alpha"] *= self.alpha_factor
            optimizer.defaults["alpha"] = optimizer.param_groups[0]["alpha"]
            if self.reduction:
                before, self.spreads[i] = self.spreads[i], optimizer.spread()
                growth = (self.spreads[i] - before) / before if before > 0 else 0.0
                share = min(max(1 + self.reduction * growth, 1 - self.reduction), 1.0)
                batch = optimizer.param_groups[0]["particle_batch_size"] or 1
                optimizer.reduce_particles(math.ceil(optimizer.num_particles / batch * share) * batch)


def _swarms(trainer: Trainer) -> list[CBO]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, CBO)]
