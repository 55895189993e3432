"""The spectrum of the empirical Fisher during training."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_methods.callbacks.mfac.training_gradients import Criterion, check_source, sample_batches, training_gradients


class EmpiricalFisherMonitor(Callback):
    """Log the trace and the largest eigenvalues of the empirical Fisher GᵀG/m every few epochs.

    The m rows of G are gradients of the training loss on fresh mini-batches, in evaluation mode. GᵀG/m (d x d) and
    GGᵀ/m (m x m) have the same non-zero eigenvalues, so d may be large; the cost is m backward passes and m·d numbers.
    Logs ``fisher/trace`` and ``fisher/eigenvalue_1`` (the largest), ``_2``, ... at the end of the epoch; the values are
    also in ``history``. The run is not disturbed, as in :class:`~lit_methods.callbacks.MFACPruning`.

    The spectrum tells what damping does to :class:`~lit_methods.optim.MFAC`: directions whose eigenvalue is far above
    λ are scaled by its inverse, the others by 1/λ.

    Args:
        num_grads: m, >= 1.
        batch_size: samples per gradient, >= 1.
        num_eigenvalues: how many to log, in [1, num_grads].
        every_n_epochs: >= 1; the first epoch counts.
        criterion: loss of (pl_module, batch); None: what ``training_step`` returns.
        dataloader: batches for the gradients; None: drawn from the training dataset.
        seed: of the draw, >= 0.

    Attributes:
        history: one dict per measurement: ``step``, ``trace``, ``eigenvalues`` (descending).

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_grads: int = 64,
        batch_size: int = 32,
        num_eigenvalues: int = 3,
        every_n_epochs: int = 1,
        criterion: Criterion | None = None,
        dataloader: Iterable[Any] | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("num_grads", num_grads), ("batch_size", batch_size), ("every_n_epochs", every_n_epochs)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 1 <= num_eigenvalues <= num_grads:
            raise ValueError(f"num_eigenvalues must be in [1, num_grads={num_grads}], got {num_eigenvalues}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self.num_grads = num_grads
        self.batch_size = batch_size
        self.num_eigenvalues = num_eigenvalues
        self.every_n_epochs = every_n_epochs
        self.criterion = criterion
        self.dataloader = dataloader
        self.seed = seed
        self.history: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far."""
        return {"history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint."""
        self.history = list(state_dict["history"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse modules that have no loss to ask for."""
        check_source(trainer, pl_module, self.criterion)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        if trainer.current_epoch % self.every_n_epochs:
            return
        params = [p for p in pl_module.parameters() if p.requires_grad]
        batches = sample_batches(trainer, self.batch_size, self.seed + trainer.current_epoch, self.dataloader)
        grads = training_gradients(trainer, pl_module, batches, self.num_grads, params, self.criterion).double()
        eigenvalues = torch.linalg.eigvalsh(grads @ grads.t() / len(grads)).flip(0)
        largest = eigenvalues[: self.num_eigenvalues].tolist()
        trace = float(eigenvalues.sum())
        self.history.append({"step": trainer.global_step, "trace": trace, "eigenvalues": largest})
        values = {"fisher/trace": trace} | {f"fisher/eigenvalue_{i}": v for i, v in enumerate(largest, 1)}
        pl_module.log_dict(values, sync_dist=True)
