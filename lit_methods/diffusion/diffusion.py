"""Training any process x prediction x weighting x time sampler x preconditioning, and sampling with any solver.

From C.-H. Lai, Y. Song, D. Kim, Y. Mitsufuji and S. Ermon, "The Principles of Diffusion Models", arXiv 2510.21890.
It shows variational, score-based and flow-based models as one: a velocity field that carries noise to data. The
equations were derived again here and are tested against closed forms; the text gives no experiments of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_methods.diffusion.conditioning import Conditioning
from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.grids import Grid
from lit_methods.diffusion.guidance import Guidance
from lit_methods.diffusion.likelihood import nll
from lit_methods.diffusion.module import GenerativeModule
from lit_methods.diffusion.predictions import combine, point_at
from lit_methods.diffusion.processes import Generators, Process, draw_noise
from lit_methods.diffusion.sampling import OnStep, Sampling, sample
from lit_methods.diffusion.solvers import Solver
from lit_methods.diffusion.time_samplers import TimeSampler, as_time_sampler
from lit_methods.diffusion.weightings import MinSNR, Weighting, as_weighting
from lit_methods.hyperparameters import live_arguments


def denoising_loss(
    denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, weighting: str | Weighting = "uniform", cond: Any = None
) -> Tensor:
    """Weighted squared error of a denoiser's own prediction, averaged over the values of each sample.

    Args:
        denoiser: the model.
        x0: data ``(batch, ...)``.
        eps: standard normal noise, of the same shape.
        t: times ``(batch,)``.
        weighting: an object, or one of ``uniform snr min_snr edm likelihood sigmoid p2``; converted to the denoiser's
            prediction.
        cond: what the model is told.

    Returns:
        ``(batch,)`` in at least float32.
    """
    process, kind = denoiser.process, denoiser.prediction
    x = process.add_noise(x0, eps, t)
    target = combine(x0, eps, kind, point_at(process, t, x0), denoiser.sigma_data)
    squared = (denoiser(x, t, cond) - target) ** 2
    return as_weighting(weighting).in_space(kind, process, t, denoiser.sigma_data) * squared.flatten(1).mean(1)


class Diffusion(GenerativeModule):
    """A diffusion or flow-matching model of any kind, trained on ``(x, y)`` batches.

    Every combination of its parts is consistent: targets, conversions and weights follow from the process and the
    prediction. Times are stratified over the batch; times, noise and dropped conditions depend on (seed, rank, step),
    so that ranks differ and a resumed run repeats nothing.

    Logs ``train/loss`` per step and ``{val,test}/loss`` per epoch, the latter with the same noise in every epoch.
    Prediction makes a sample for each row of the batch, told of the row's ``y`` if the model is conditional.

    Example:
        >>> from lit_methods.diffusion import Diffusion, TimeMLP
        >>> model = Diffusion(TimeMLP([1, 8, 8]), process="fm", prediction="flow", time_sampler="logit_normal")

    Args:
        net: ``net(x, t)``, or ``net(x, t, cond)`` for a conditional model, that gives a prediction shaped like ``x``.
        process: the path, an object or one of ``vp_linear vp_cosine sub_vp ve edm fm trigflow``.
        prediction: what the network predicts: ``x0 epsilon score flow v_prediction edm``.
        precondition: what the network sees: ``"none"``, ``x`` and ``t``; ``"edm"``, ``x`` over its standard deviation
            and ``log(sigma / alpha) / 4``.
        sigma_data: standard deviation of the data, > 0; matters for ``edm`` and its weights only.
        weighting: of the loss, an object or one of ``uniform snr min_snr edm likelihood sigmoid p2``.
        time_sampler: of training times, an object or one of ``uniform lognormal_sigma logit_normal shifted
            lambda_uniform karras_grid discrete``.
        conditioning: what the model is told of a sample (``Labels(10)`` for ``y`` in ten classes); ``None``: nothing.
        sampling: how samples are made.
        clip_x0: smallest and largest value of a clean sample when sampling; ``None`` does not clip.
        optimizer: builds the optimizer.
        lr_scheduler: builds a learning rate scheduler, stepped after every optimizer step.
        seed: of times and noise, >= 0; ``None`` draws one from torch's generator.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        process: str | Process = "fm",
        prediction: str = "flow",
        precondition: str = "none",
        sigma_data: float = 0.5,
        weighting: str | Weighting = "uniform",
        time_sampler: str | TimeSampler = "uniform",
        conditioning: Conditioning | None = None,
        sampling: Sampling | None = None,
        clip_x0: tuple[float, float] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.denoiser = Denoiser(net, process, prediction, precondition, sigma_data, conditioning, clip_x0)
        self.weighting = as_weighting(weighting)
        self.time_sampler = as_time_sampler(time_sampler)
        self.sampling = sampling or Sampling()
        self.begin(optimizer, lr_scheduler, seed)
        _check_ends(self.denoiser, self.weighting)

    def loss(self, x0: Tensor, cond: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """Mean loss of data at random times, ``()``."""
        dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
        process = self.denoiser.process
        t = self.time_sampler.sample(len(x0), process, generator, x0.device, dtype, stratified=True)
        eps = draw_noise(x0.shape, generator, x0.device, x0.dtype)
        return denoising_loss(self.denoiser, x0, eps, t, self.weighting, cond).mean()

    def on_first_batch(self, x: Tensor) -> None:
        """Compare ``sigma_data`` with the data, where it matters."""
        _check_spread(self.denoiser, self.weighting, x)

    def sample(
        self,
        n: int,
        cond: Any = None,
        *,
        solver: str | Solver | None = None,
        steps: int | None = None,
        guidance: float | Guidance | None = None,
        grid: str | Grid | None = None,
        generator: Generators = None,
        x_init: Tensor | None = None,
        shape: Sequence[int] | None = None,
        process: str | Process | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Make samples; what is left out is as in ``sampling``.

        :func:`lit_methods.diffusion.sample` with ``model.denoiser`` takes more arguments.

        Args:
            n: number of samples, >= 1.
            cond: one condition per sample.
            solver: of the ODE or SDE.
            steps: number of steps, >= 1.
            guidance: an object, or the scale of classifier-free guidance.
            grid: where the steps lie.
            generator: source of randomness; a list has one for each sample.
            x_init: noise to start from.
            shape: of one sample; default: that of the training data.
            process: path to follow, where it is not the model's own.
            on_step: called with the time, the noisy and the predicted clean samples whenever the network was.

        Raises:
            ValueError: an argument out of range, or no shape is known.
        """
        settings = self.sampling
        return sample(
            self.denoiser,
            self.known_shape(n, shape),
            solver=settings.solver if solver is None else solver,
            steps=settings.steps if steps is None else steps,
            guidance=settings.guidance if guidance is None else guidance,
            grid=settings.grid if grid is None else grid,
            cond=cond,
            generator=generator,
            x_init=x_init,
            device=self.device,
            process=process,
            on_step=on_step,
        )

    def nll(self, x: Tensor, cond: Any = None, *, steps: int = 100, probes: int | None = 1) -> Tensor:
        """Negative log-likelihood of samples in nats, ``(batch,)``; see :func:`lit_methods.diffusion.nll`."""
        return nll(self.denoiser, x, cond, steps=steps, probes=probes, generator=self._stream("nll"))


def _check_ends(denoiser: Denoiser, weighting: Weighting) -> None:
    """Say what is peculiar about paths that end in pure noise."""
    if float(denoiser.process.alpha(denoiser.process.t_max)) > 0:
        return
    if denoiser.prediction in ("epsilon", "score"):
        raise ValueError(
            f"prediction must be x0, flow, v_prediction or edm for {denoiser.process}, whose last time is pure noise, "
            f"got {denoiser.prediction!r}: there it says nothing of the data"
        )
    if isinstance(weighting, MinSNR) and denoiser.prediction != "epsilon":
        rank_zero_warn(f"min_snr weighs {denoiser.prediction!r} by nearly 0 close to pure noise; this is intended.")


def _check_spread(denoiser: Denoiser, weighting: Weighting, x: Tensor) -> None:
    """Compare ``sigma_data`` with the first batch, where it matters."""
    if "edm" not in (denoiser.prediction, denoiser.precondition, weighting.space):
        return
    std = float(x.float().std())
    if not 1 / 1.5 <= std / denoiser.sigma_data <= 1.5:
        rank_zero_warn(
            f"sigma_data={denoiser.sigma_data:g}, but the first batch has standard deviation {std:.3g}: pass "
            f"sigma_data={std:.2g}, or scale the data."
        )
