"""Latent SDEs driven by fractional noise, as a LightningModule."""

import math
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_methods.batches import PathBatch
from lit_methods.diffusion.streams import check_seed, stream
from lit_methods.hyperparameters import live_arguments
from lit_methods.precision import load_unrounded
from lit_methods.vi.fractional_sde.networks import Encoding
from lit_methods.vi.fractional_sde.sde import FractionalSDE, SDEPath


class FractionalSDEModule(LightningModule):
    r"""Variational inference for SDEs driven by fractional noise (Daems et al., arXiv 2310.12975).

    Drift, diffusion, control, the noise's Hurst index, encoder and decoder are learned together by the bound
    ``log p(data) >= E[log p(values | x)] - KL(x0) - KL(path)``. Use it for irregular or incomplete series whose noise
    may be rough (H < 1/2) or persistent (H > 1/2), to learn H, to smooth, and to forecast with the noise's memory;
    with ``MarkovFBM(kind="white")`` it is an ordinary latent SDE. For the index of one observed path without a model
    :func:`fit_hurst` is exact and takes seconds.

    Observations are Gaussian around the decoded state. For video pass :class:`VideoEncoder` and :class:`VideoDecoder`.
    With a learned diffusion and a learned H use ``MarkovFBM(normalize=True)``.

    Logs, in nats per series, summed over time and averaged over the batch: ``{train,val,test}/elbo``, ``nll``,
    ``kl_path``, with an encoder ``kl_x0``, with a posterior of ``Y(0)`` ``kl_y0``; ``mse`` per observed number;
    ``train/loss``; ``hurst``, and ``obs_std`` where it is learned. Random numbers depend on (seed, rank, step).

    Differs from the authors' code: observation noise and its constant are part of the bound, H is learned within (0.02,
    0.98) by a scaled sigmoid, and the first state's context is that of the first frame.

    Example:
        >>> from lit_methods.vi import ControlMLP, FractionalSDE, LinearDrift, MarkovFBM
        >>> noise = MarkovFBM(hurst=0.7, time_horizon=2.0)
        >>> sde = FractionalSDE(LinearDrift(), 1.0, ControlMLP(1, 5), noise, state_dim=1, dt=0.01)
        >>> model = FractionalSDEModule(sde, obs_std=0.1)
        >>> batch = PathBatch(torch.tensor([0.0, 2.0]), torch.zeros(8, 2, 1), torch.tensor([[False, True]] * 8))
        >>> model(batch).shape
        torch.Size([8, 2, 1])

    Args:
        sde: the model of paths and its control.
        encoder: ``encoder(times, values, mask)`` to an :class:`Encoding`; ``None``: all series start at ``x0`` and the
            control is told the time only, which is right only where all have the same observations.
        decoder: ``decoder(x, content)``: states ``(batch, T, state_dim)`` to means ``(batch, T, ...)``; ``None``: the
            state itself is observed.
        y0_posterior: posterior of the noise's memory at the first time, for kind "I" (:class:`NoisePosterior`);
            ``None``: its prior, which leaves the bound loose.
        x0: the first state without an encoder.
        obs_std: standard deviation of the observation noise, > 0; ``None``: learned, from 1 on.
        kl_weight: of all divergences in the loss, >= 0; 1 for the bound.
        num_paths: paths that :meth:`predict_step` averages, >= 2.
        optimizer: builds the optimizer.
        lr_scheduler: builds a learning rate scheduler, stepped after every optimizer step.
        seed: of the random numbers, >= 0; ``None`` draws one from torch's generator.

    Raises:
        ValueError: an argument out of range; a batch with times that are not one increasing grid, or with values that
            are not finite where they are not masked.
    """

    def __init__(
        self,
        sde: FractionalSDE,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        y0_posterior: nn.Module | None = None,
        x0: float = 0.0,
        obs_std: float | None = 0.1,
        kl_weight: float = 1.0,
        num_paths: int = 32,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=3e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        self.save_hyperparameters(ignore=live_arguments(locals()))
        if sde.control is None:
            raise ValueError("sde must have a control, got None")
        if y0_posterior is not None and sde.noise.kind != "I":
            raise ValueError(f"y0_posterior must be None unless the noise is of kind 'I', got kind {sde.noise.kind!r}")
        if not math.isfinite(x0):
            raise ValueError(f"x0 must be finite, got {x0}")
        if obs_std is not None and not 0 < obs_std < math.inf:
            raise ValueError(f"obs_std must be > 0 and finite, or None, got {obs_std}")
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"kl_weight must be >= 0 and finite, got {kl_weight}")
        if num_paths < 2:
            raise ValueError(f"num_paths must be >= 2, got {num_paths}")
        self.sde, self.encoder, self.decoder, self.y0_posterior = sde, encoder, decoder, y0_posterior
        self.x0, self.fixed_std, self.kl_weight, self.num_paths = x0, obs_std, kl_weight, num_paths
        self.log_std = nn.Parameter(torch.zeros(())) if obs_std is None else None
        if encoder is not None:
            self.prior_mean = nn.Parameter(torch.zeros(sde.state_dim))
            self.prior_log_variance = nn.Parameter(torch.zeros(sde.state_dim))
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.seed, self.steps_drawn = check_seed(seed), 0

    @property
    def obs_std(self) -> Tensor:
        """Standard deviation of the observation noise, ``()``."""
        if self.log_std is not None:
            return self.log_std.exp()
        return torch.tensor(self.fixed_std, device=self.device)

    def forward(self, batch: PathBatch) -> Tensor:
        """Means of the observations along one path of the posterior for each series, ``(batch, T, ...)``."""
        path, encoding, _ = self._posterior(batch, None)
        return self._decode(path.x, encoding)

    def terms(self, batch: PathBatch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Parts of the bound for each series, ``(batch,)``: ``nll`` and the ``kl_...`` in nats; and ``mse``."""
        path, encoding, found = self._posterior(batch, generator)
        mean = self._decode(path.x, encoding).to(self._wide)
        if mean.shape != batch.values.shape:
            raise ValueError(
                f"values must have the decoder's shape {tuple(mean.shape)}, got {tuple(batch.values.shape)}"
            )
        # Holes are filled before the subtraction: a NaN that is masked after it still has NaN gradients.
        seen = batch.mask.reshape(*batch.mask.shape, *[1] * (mean.ndim - 2))
        error = torch.where(seen, torch.where(seen, batch.values, 0.0) - mean, 0.0).square().flatten(1).sum(1)
        count = batch.mask.sum(1) * mean[0, 0].numel()
        std = self.obs_std
        found["nll"] = error / (2 * std**2) + count * (std.log() + 0.5 * math.log(2 * math.pi))
        found["kl_path"] = path.path_kl
        found["mse"] = error / count.clamp(min=1)
        return found

    @torch.no_grad()
    def sample_prior(self, n: int, times: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """States of new series, ``(n, T, state_dim)``, at times ``(T,)``.

        Raises:
            ValueError: ``n`` is below 1, or the times are no increasing grid.
        """
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}")
        return self.sde.sample_prior(self._prior_start(n, generator), times, generator=generator).x

    def posterior_states(self, batch: PathBatch, generator: torch.Generator | None = None) -> Tensor:
        """States along one path of the posterior for each series, ``(batch, T, state_dim)``."""
        return self._posterior(batch, generator)[0].x

    @torch.no_grad()
    def forecast(
        self, batch: PathBatch, times: Tensor, num_paths: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Means of future observations: the posterior over the batch's times, then the prior from its last state on.

        The noise's memory goes on with the path: drawing it anew would forget what the noise did.

        Args:
            batch: the series so far.
            times: increasing times after the batch's last, ``(H,)``.
            num_paths: per series, >= 1; ``None``: the constructor's.
            generator: of the random numbers.

        Returns:
            ``(num_paths, batch, H, ...)``; observation noise is not added.

        Raises:
            ValueError: a time that is not later than the batch's last.
        """
        num_paths = self.num_paths if num_paths is None else num_paths
        if num_paths < 1:
            raise ValueError(f"num_paths must be >= 1, got {num_paths}")
        last = batch.times[-1:]
        if not bool(times[:1] > last):
            raise ValueError(
                f"times must be later than the last observation's {float(last):g}, got {float(times[0]):g}"
            )
        path, encoding, _ = self._posterior(_repeat(batch, num_paths), generator)
        horizon, noise = float(times[-1] - batch.times[0]), self.sde.noise
        if noise.kind != "white" and horizon > noise.time_horizon * (1 + 1e-6):
            warnings.warn(
                f"times end {horizon:g} after the first observation, but the noise's weights fit a time_horizon of "
                f"{noise.time_horizon:g}: set it to the longest path",
                stacklevel=2,
            )
        future = self.sde.sample_prior(path.x[:, -1], torch.cat([last, times.to(last)]), path.y, generator)
        return self._decode(future.x[:, 1:], encoding).unflatten(0, (num_paths, -1))

    def training_step(self, batch: PathBatch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        generator = self._stream("train", self.steps_drawn)
        self.steps_drawn += 1
        means = self._means(batch, generator)
        kl = sum(value for name, value in means.items() if name.startswith("kl_"))
        loss = means["nll"] + self.kl_weight * kl
        self.log_dict(
            {"train/loss": loss.detach(), **{f"train/{k}": v.detach() for k, v in means.items()}},
            batch_size=len(batch.mask),
        )
        if not self.sde.noise.varies:
            self.log("train/hurst", self.sde.noise.hurst.detach().float(), batch_size=len(batch.mask))
        if self.log_std is not None:
            self.log("train/obs_std", self.obs_std.detach(), batch_size=len(batch.mask))
        return loss

    def validation_step(self, batch: PathBatch, batch_idx: int) -> None:
        """Log the parts of the bound."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: PathBatch, batch_idx: int) -> None:
        """Log the parts of the bound."""
        self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: PathBatch, batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior's decoded paths at all times, holes too: ``(batch, T, ...)``."""
        many = _repeat(batch, self.num_paths)
        path, encoding, _ = self._posterior(many, self._stream("predict", dataloader_idx, batch_idx))
        decoded = self._decode(path.x, encoding).unflatten(0, (self.num_paths, -1))
        return decoded.mean(0), decoded.std(0)

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
        """Save what random numbers depend on."""
        checkpoint["fractional_sde"] = {"seed": self.seed, "steps_drawn": self.steps_drawn}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the saved seed."""
        for name, value in checkpoint["fractional_sde"].items():
            setattr(self, name, value)

    @property
    def _wide(self) -> torch.dtype:
        """The type of states and of what is summed: float32 at least."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _posterior(
        self, batch: PathBatch, generator: torch.Generator | None
    ) -> tuple[SDEPath, Encoding | None, dict[str, Tensor]]:
        """Paths of the posterior, what the encoder said, and the divergences of the start."""
        if not torch.where(batch.mask, batch.values.flatten(2).isfinite().all(-1), True).all():
            raise ValueError("values must be finite where mask is True, got NaN or infinity")
        rows, found, encoding = len(batch.mask), {}, None
        context = first = None
        if self.encoder is None:
            start = self._prior_start(rows, generator)
        else:
            encoding = self.encoder(batch.times, batch.values, batch.mask)
            mean, log_variance = encoding.mean.to(self._wide), encoding.log_variance.to(self._wide)
            context = encoding.context
            first = context[:, 0] if context.ndim == 3 else context
            eps = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            start = mean + (0.5 * log_variance).exp() * eps
            ratio = (log_variance - self.prior_log_variance).exp()
            shift = (mean - self.prior_mean).square() / self.prior_log_variance.exp()
            found["kl_x0"] = 0.5 * (ratio + shift - 1 - ratio.log()).sum(-1)
        y0 = None
        if self.y0_posterior is not None:
            noise = self.sde.noise
            shape = (rows, self.sde.state_dim, noise.num_ou)
            draws = torch.randn(shape, generator=generator, device=start.device, dtype=start.dtype)
            factor = torch.linalg.cholesky(noise.initial_covariance())
            y0, found["kl_y0"] = self.y0_posterior(rows, first, draws, factor)
        return self.sde(start, batch.times, context, y0, generator), encoding, found

    def _prior_start(self, rows: int, generator: torch.Generator | None) -> Tensor:
        shape = (rows, self.sde.state_dim)
        if self.encoder is None:
            return torch.full(shape, self.x0, device=self.device, dtype=self._wide)
        eps = torch.randn(shape, generator=generator, device=self.device, dtype=self._wide)
        return self.prior_mean + (0.5 * self.prior_log_variance).exp() * eps

    def _decode(self, x: Tensor, encoding: Encoding | None) -> Tensor:
        if self.decoder is None:
            return x
        return self.decoder(x, None if encoding is None else encoding.content)

    def _means(self, batch: PathBatch, generator: torch.Generator) -> dict[str, Tensor]:
        found = {name: value.mean() for name, value in self.terms(batch, generator).items()}
        bound = -found["nll"] - sum(value for name, value in found.items() if name.startswith("kl_"))
        return found | {"elbo": bound}

    def _stream(self, *place: int | str) -> torch.Generator:
        rank = 0 if self._trainer is None else self.trainer.global_rank
        return stream(self.device, self.seed, rank, *place)

    def _evaluate(self, batch: PathBatch, batch_idx: int, stage: str) -> None:
        means = self._means(batch, self._stream(stage, batch_idx))
        self.log_dict({f"{stage}/{k}": v for k, v in means.items()}, batch_size=len(batch.mask), sync_dist=True)


def _repeat(batch: PathBatch, times: int) -> PathBatch:
    """The same series ``times`` times, one copy of the batch after the other."""
    values = batch.values.repeat(times, *[1] * (batch.values.ndim - 1))
    return PathBatch(batch.times, values, batch.mask.repeat(times, 1))
