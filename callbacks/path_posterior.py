"""What a fractional SDE believes about series, as a figure and beside the truth where that is known."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from lit_methods.batches import PathBatch
from lit_methods.callbacks.figures import output_dir, save_figure
from lit_methods.vi.fractional_sde import FractionalSDEModule
from lit_methods.vi.fractional_sde.linear import is_linear, linear_covariance


class PathPosterior(Callback):
    """Draw a :class:`FractionalSDEModule`'s posterior beside the data, and samples of its prior; in the test.

    The picture is ``paths.png`` in the log folder: for the first series of the first test batch the observations and
    mean and two standard deviations of the posterior's paths, and next to it paths of the prior. Of videos or several
    observed numbers it shows the state's first dimension, without the data.

    Where the model is linear and Gaussian (:class:`LinearDrift`, a number as diffusion, no encoder or decoder, one
    dimension) it also logs ``test/log_evidence``, the exact one that ``test/elbo`` bounds, and ``test/std_error``, the
    largest error of the posterior's standard deviation on ``num_times`` times, relative to 1.

    Args:
        num_paths: paths of the posterior, >= 2.
        num_prior: paths of the prior that are drawn, >= 1.
        num_times: times between the first and the last of the data at which to look, >= 2.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, num_paths: int = 500, num_prior: int = 8, num_times: int = 41) -> None:
        for name, value, least in (
            ("num_paths", num_paths, 2),
            ("num_prior", num_prior, 1),
            ("num_times", num_times, 2),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self.num_paths, self.num_prior, self.num_times = num_paths, num_prior, num_times
        self._batch: PathBatch | None = None

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int, *_: object
    ) -> None:
        """Keep the first series."""
        if batch_idx == 0 and isinstance(batch, PathBatch) and isinstance(pl_module, FractionalSDEModule):
            self._batch = batch._replace(values=batch.values[:1], mask=batch.mask[:1])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, and compare with the exact posterior if there is one."""
        batch, self._batch = self._batch, None
        if batch is None or not isinstance(pl_module, FractionalSDEModule):
            return
        generator = torch.Generator(pl_module.device).manual_seed(0)
        first, last = batch.times[0], batch.times[-1]
        extra = first + (last - first) * torch.linspace(0, 1, self.num_times, device=first.device)
        # Only a model without an encoder may be asked about times that are not in the data.
        seen = _with_times(batch, extra) if pl_module.encoder is None else batch
        many = seen._replace(
            values=seen.values.expand(self.num_paths, *seen.values.shape[1:]), mask=seen.mask.expand(self.num_paths, -1)
        )
        with torch.no_grad():
            paths = pl_module.posterior_states(many, generator)[..., 0].double()
            prior = pl_module.sample_prior(self.num_prior, seen.times, generator)[..., 0]
        linear = pl_module.encoder is None and pl_module.decoder is None and pl_module.sde.state_dim == 1
        exact = None
        if linear and is_linear(pl_module.sde) and not pl_module.x0:
            evidence, exact = _exact(pl_module, seen)
            error = (paths.std(0).cpu() - exact).abs().max()
            found = {"test/log_evidence": evidence.float(), "test/std_error": error.float()}
            pl_module.log_dict(found, sync_dist=True)
        folder = output_dir(trainer)
        if trainer.is_global_zero:
            data = batch if pl_module.decoder is None and batch.values.ndim == 3 else None
            save_figure(trainer, _draw(seen.times, paths, prior, data, exact), "paths", folder)


def _with_times(batch: PathBatch, extra: Tensor) -> PathBatch:
    """The batch with more times, at which nothing was observed."""
    times = torch.cat([batch.times, extra]).unique()
    place = torch.searchsorted(times, batch.times)
    values = batch.values.new_zeros(len(batch.values), len(times), *batch.values.shape[2:])
    mask = torch.zeros(len(values), len(times), dtype=torch.bool, device=times.device)
    values[:, place], mask[:, place] = torch.nan_to_num(batch.values), batch.mask
    return PathBatch(times, values, mask)


def _exact(module: FractionalSDEModule, batch: PathBatch) -> tuple[Tensor, Tensor]:
    """The evidence of the batch's only series, and the exact posterior's standard deviations at all times."""
    covariance = linear_covariance(module.sde, batch.times)
    seen = batch.mask[0].cpu()
    noisy = covariance[seen][:, seen] + module.obs_std.double().cpu() ** 2 * torch.eye(int(seen.sum()))
    values = batch.values[0, :, 0].cpu().double()[seen]
    evidence = torch.distributions.MultivariateNormal(torch.zeros_like(values), noisy).log_prob(values)
    gain = torch.linalg.solve(noisy, covariance[seen])
    variance = covariance.diag() - (covariance[:, seen] * gain.T).sum(1)
    return evidence, variance.clamp(min=0).sqrt()


def _draw(times: Tensor, paths: Tensor, prior: Tensor, data: PathBatch | None, exact: Tensor | None) -> Figure:
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    t, mean, std = times.cpu(), paths.mean(0).cpu(), paths.std(0).cpu()
    left.fill_between(t, mean - 2 * std, mean + 2 * std, alpha=0.3, label="posterior, 2 deviations")
    left.plot(t, mean)
    left.plot(t, paths[:3].cpu().T, color="grey", lw=0.6)
    if exact is not None:
        left.plot(t, mean - 2 * exact, "k:", lw=1, label="with the exact deviation")
        left.plot(t, mean + 2 * exact, "k:", lw=1)
    if data is not None:
        seen = data.mask[0].cpu()
        left.plot(data.times.cpu()[seen], data.values[0, :, 0].cpu()[seen], "r.", label="observed")
    left.set(title="posterior of the first test series", xlabel="time")
    left.legend(fontsize="small")
    right.plot(t, prior.cpu().T, lw=0.8)
    right.set(title="prior", xlabel="time")
    return figure
