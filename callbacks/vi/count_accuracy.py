"""Whether a guide counts right."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class CountAccuracy(Callback):
    """Compare the sum of some binary choices of a guide with the number ``batch.y``, in validation and test.

    Draws the guide of a :class:`~lit_methods.vi.ProgrammableVI` once for every row, and logs ``val/count_accuracy`` and
    ``test/count_accuracy``, the share of rows whose count is right.

    Args:
        sites: names of the choices, at least one.

    Raises:
        ValueError: ``sites`` is empty; in validation: it names a site that the guide does not have.
        TypeError: the module is not a ``ProgrammableVI``.
    """

    def __init__(self, sites: list[str]) -> None:
        if not sites:
            raise ValueError(f"sites must name at least one site, got {sites}")
        self.sites = list(sites)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other modules."""
        from lit_methods.vi import ProgrammableVI

        if not isinstance(pl_module, ProgrammableVI):
            raise TypeError(f"the module must be a ProgrammableVI, got {type(pl_module).__name__}")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count."""
        self._count("val", pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count."""
        self._count("test", pl_module, batch)

    def _count(self, stage: str, pl_module: Any, batch: Any) -> None:
        trace = pl_module.sample_posterior(batch)
        missing = [site for site in self.sites if site not in trace]
        if missing:
            raise ValueError(f"sites must be among those of the guide, {list(trace)}, got {missing} too")
        count: Tensor = torch.stack([trace[site] for site in self.sites]).sum(0).round()
        right = (count == batch.y).float().mean()
        pl_module.log(
            f"{stage}/count_accuracy", right, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch.y)
        )
