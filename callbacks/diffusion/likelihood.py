"""The likelihood of test data."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_methods.diffusion import bits_per_dim, nll
from lit_methods.diffusion.streams import stream


class LikelihoodEvaluation(Callback):
    """Log the negative log-likelihood of the test data: ``test/nll`` in nats, and ``test/bits_per_dim``.

    For a module with a ``denoiser`` of the data, as :class:`~lit_methods.diffusion.Diffusion` is, or with a method
    ``log_prob``, as :class:`~lit_methods.diffusion.MultiplicativeDiffusion`.

    Args:
        steps: steps of the ODE, >= 1.
        probes: random vectors that estimate the divergence, >= 1; ``None``: exact, for samples of few values.
        levels: different values that the data had when they were stored, >= 2, for bits per dimension; ``None``: no
            bits. Uniform noise of one level is added to the data then.
        value_range: the smallest and the largest of these values.
        seed: of probes and noise, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        steps: int = 100,
        probes: int | None = 1,
        levels: int | None = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
        seed: int = 0,
    ) -> None:
        for name, value, low in (("steps", steps, 1), ("probes", probes, 1), ("levels", levels, 2), ("seed", seed, 0)):
            if value is not None and value < low:
                raise ValueError(f"{name} must be >= {low}, got {value}")
        if not value_range[0] < value_range[1]:
            raise ValueError(f"value_range must be two rising numbers, got {value_range}")
        self.steps = steps
        self.probes = probes
        self.levels = levels
        self.value_range = value_range
        self.seed = seed

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        x, denoiser = batch[0], pl_module.denoiser
        cond = None if denoiser.conditioning is None else batch[1]  # type: ignore[union-attr]
        generator = stream(x.device, self.seed, trainer.global_rank, dataloader_idx, batch_idx)
        if self.levels is not None:
            noise = x.new_empty(x.shape).uniform_(-0.5, 0.5, generator=generator)
            x = x + noise * (self.value_range[1] - self.value_range[0]) / (self.levels - 1)
        settings: Any = {"steps": self.steps, "probes": self.probes, "generator": generator}
        log_prob: Any = getattr(pl_module, "log_prob", None)
        nats = nll(denoiser, x, cond, **settings) if log_prob is None else -log_prob(x, cond, **settings)  # type: ignore[arg-type]
        pl_module.log("test/nll", nats.mean(), on_step=False, on_epoch=True, sync_dist=True, batch_size=len(x))
        if self.levels is not None:
            bits = bits_per_dim(nats, x[0].numel(), self.levels, self.value_range).mean()
            pl_module.log("test/bits_per_dim", bits, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(x))
