"""The multiplicative model as a LightningModule."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_methods.diffusion.conditioning import Conditioning
from lit_methods.diffusion.dale_langevin.losses import check_positive_data
from lit_methods.diffusion.dale_langevin.network import PRIORS, LogNetwork, log_moments
from lit_methods.diffusion.dale_langevin.process import GeometricBrownian
from lit_methods.diffusion.dale_langevin.samplers import DLS, UMS
from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.diffusion import denoising_loss
from lit_methods.diffusion.grids import Grid
from lit_methods.diffusion.guidance import Guidance
from lit_methods.diffusion.likelihood import nll
from lit_methods.diffusion.module import GenerativeModule
from lit_methods.diffusion.processes import Generators, draw_noise
from lit_methods.diffusion.sampling import OnStep, Sampling, sample
from lit_methods.diffusion.solvers import Solver
from lit_methods.diffusion.time_samplers import TimeSampler, as_time_sampler
from lit_methods.diffusion.weightings import Weighting, as_weighting
from lit_methods.hyperparameters import live_arguments


@dataclass(frozen=True)
class PositiveData:
    """How data becomes positive, and what is known of its logarithm.

    Args:
        shift: added to the data before its logarithm is taken, and taken off samples, >= 0. The paper's images in [0,
            1] become [1, 2]. 0 for data that is positive itself: there is no hidden epsilon.
        range: samples are clamped to it at the very end, in shifted units; ``None`` for data without bounds.
        prior: mean and variance of ``log(x + shift)``, from which sampling starts and by which the network's input is
            standardised, as one number each ("scalar"), by "channel", the first dimension of a sample, or by "pixel".
        max_batches: training batches that they are computed from, >= 1; ``None``: all.

    Raises:
        ValueError: an argument out of range.
    """

    shift: float = 1.0
    range: tuple[float, float] | None = (1.0, 2.0)
    prior: Literal["scalar", "channel", "pixel"] = "pixel"
    max_batches: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.shift < math.inf:
            raise ValueError(f"shift must be >= 0, got {self.shift}")
        if self.range is not None and not 0 <= self.range[0] < self.range[1]:
            raise ValueError(f"range must be two rising numbers >= 0, or None, got {self.range}")
        if self.prior not in PRIORS:
            raise ValueError(f"prior must be one of {list(PRIORS)}, got {self.prior!r}")
        if self.max_batches is not None and self.max_batches < 1:
            raise ValueError(f"max_batches must be >= 1 or None, got {self.max_batches}")


class MultiplicativeDiffusion(GenerativeModule):
    """Diffusion of positive data by multiplicative noise (Shetty, Prasath, Seelamantula, arXiv 2510.02730).

    Data ``x + shift`` follows geometric Brownian motion, and samples come from multiplicative updates, so that they are
    positive without squashing: intensities, rates, prices, spectra. In the logarithm it is a variance-exploding
    diffusion, and everything of this package (solvers, guidance, weights) works on ``denoiser``, the model in the
    coordinate ``y`` of :class:`GeometricBrownian`. For data in which zero means nothing special use
    :class:`Diffusion`.

    Before training one pass over the training data finds mean and variance of its logarithm, over all ranks. Times are
    stratified over the batch; times, noise and dropped conditions depend on (seed, rank, step). Logs ``train/loss`` per
    step and ``{val,test}/loss`` per epoch. Prediction makes a sample for each row of the batch.

    Differs from the authors' code: noise and network see the same step (theirs are one apart, so that the true score
    does not have zero loss); by default the network predicts the noise; the last step of a sampler adds none.

    Example:
        >>> from lit_methods.diffusion import MultiplicativeDiffusion, TimeMLP
        >>> model = MultiplicativeDiffusion(TimeMLP([1, 8, 8]), shape=[1, 8, 8])

    Args:
        net: ``net(seen, time)``, or ``net(seen, time, cond)``, that gives a prediction shaped like ``seen``.
        shape: shape of one sample.
        process: the noise; default: the paper's ``mu = 0.32, volatility = 0.8``.
        data: how data becomes positive.
        prediction: what the network predicts: "epsilon" the noise, "hyvarinen" ``x grad log p``, "stein" ``grad log p``
            as in the paper.
        network_input: what the network sees: "log", ``y`` standardised by the data's moments, and where ``log t`` lies
            between that of ``t_min`` (0) and that of ``t_max`` (1); "x", the positive sample and the time themselves,
            as in the paper.
        weighting: of the squared error of the noise, an object or a name as in :class:`Diffusion`;
            :class:`NoiseVariance` is the authors' ``(sigma^2 t)^2`` for the Hyvarinen score.
        time_sampler: of training times, an object or a name as in :class:`Diffusion`.
        conditioning: what the model is told of a sample (``Labels(10)`` for ``y`` in ten classes); ``None``: nothing.
        sampling: how samples are made; default: :class:`DLS` in 1000 steps. ``Sampling("ddim", 20)`` is the ODE in 20.
        optimizer: builds the optimizer.
        lr_scheduler: builds a learning rate scheduler, stepped after every optimizer step.
        seed: of times and noise, >= 0; ``None`` draws one from torch's generator.

    Attributes:
        clamped: share of the values of the last samples that were clamped; ``None`` before, or without a range.

    Raises:
        ValueError: an argument out of range; when training begins, data that is not positive.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: Sequence[int],
        process: GeometricBrownian | None = None,
        data: PositiveData | None = None,
        prediction: str = "epsilon",
        network_input: str = "log",
        weighting: str | Weighting = "uniform",
        time_sampler: str | TimeSampler = "uniform",
        conditioning: Conditioning | None = None,
        sampling: Sampling | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.data = data or PositiveData()
        self.process = process or GeometricBrownian()
        network = LogNetwork(net, shape, self.process, prediction, network_input, self.data.prior)
        self.denoiser = Denoiser(network, self.process, "epsilon", conditioning=conditioning)
        self.weighting = as_weighting(weighting)
        self.time_sampler = as_time_sampler(time_sampler)
        self.sampling = sampling or Sampling(DLS(), steps=1000)
        self.begin(optimizer, lr_scheduler, seed)
        self.shape = tuple(shape)
        self.clamped: Tensor | None = None

    @property
    def network(self) -> LogNetwork:
        """The network and the moments of the data's logarithm."""
        return cast(LogNetwork, self.denoiser.net)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Tensor | None = None) -> Tensor:
        """The predicted noise in ``log x``, of noisy ``x`` ``(batch, ...)`` in units of the data, at ``(batch,)``."""
        return self.denoiser(self.process.to_log(x + self.data.shift, t), t, cond)

    def hyvarinen_score(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """``(x + shift) grad log p_t(x)``; arguments as in :meth:`forward`."""
        return self.process.hyvarinen(self(x, t, cond), t)

    def stein_score(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """``grad log p_t(x)``; arguments as in :meth:`forward`."""
        return self.hyvarinen_score(x, t, cond) / (x + self.data.shift)

    def loss(self, x0: Tensor, cond: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """Mean loss of data at random times, ``()``."""
        dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
        t = self.time_sampler.sample(len(x0), self.process, generator, x0.device, dtype, stratified=True)
        x0 = x0.to(dtype)
        # Looking at the data of every step would wait for the device; all of them were seen before training.
        x = x0 + self.data.shift if self.training and x0.device.type != "cpu" else self._positive(x0)
        y = self.process.to_log(x, 0.0)
        eps = draw_noise(y.shape, generator, y.device, y.dtype)
        return denoising_loss(self.denoiser, y, eps, t, self.weighting, cond).mean()

    @torch.no_grad()
    def fit_moments(self, batches: Iterable[Any]) -> None:
        """Find mean and variance of the data's logarithm; training does so by itself.

        Args:
            batches: ``(x, ...)`` with samples ``(batch, *shape)``; every rank its own share.

        Raises:
            ValueError: data that is not positive, or of another shape.
        """
        sums = log_moments((self._positive(batch[0]) for batch in islice(batches, self.data.max_batches)), self.process)
        if self._trainer is not None:
            strategy = self.trainer.strategy
            sums = tuple(strategy.reduce(value.to(strategy.root_device), reduce_op="sum").cpu() for value in sums)  # type: ignore[assignment]
        self.network.set_moments(*sums)

    def on_fit_start(self) -> None:
        """Find the moments of the training data, unless a checkpoint brought them."""
        if not self.network.log_count:
            self.fit_moments(self.trainer.fit_loop._data_source.dataloader())

    def on_validation_epoch_end(self) -> None:
        """Log the clamped share of samples that a callback made."""
        self._log_clamped("val")

    def on_test_epoch_end(self) -> None:
        """Log the clamped share of samples that a callback made."""
        self._log_clamped("test")

    @torch.no_grad()
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
        on_step: OnStep | None = None,
        shape: Sequence[int] | None = None,
    ) -> Tensor:
        """Make samples in units of the data; what is left out is as in ``sampling``.

        Args:
            n: number of samples, >= 1.
            cond: one condition per sample.
            solver: :class:`DLS` or "dls", :class:`UMS` or "ums", or any other of this package, such as "ddim" or
                "dpmpp_2m".
            steps: number of steps, >= 1.
            guidance: an object, which sees samples in the coordinate ``y``, or the scale of classifier-free guidance.
            grid: where the steps lie.
            generator: source of randomness; a list has one for each sample.
            x_init: samples at the last time to start from, instead of log-normal noise of the data's moments; the
                authors' start from class averages is :meth:`diffuse` of these.
            on_step: called with the time, the noisy and the predicted clean samples whenever the network was.
            shape: of one sample; that of the model, the only one it can make.

        Raises:
            ValueError: an argument out of range.
        """
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}")
        if shape is not None and tuple(shape) != self.shape:
            raise ValueError(f"shape must be that of the model, {self.shape}, got {tuple(shape)}")
        settings = self.sampling
        solver = settings.solver if solver is None else solver
        if isinstance(solver, str) and solver in ("dls", "ums"):
            solver = DLS() if solver == "dls" else UMS()

        def in_units_of_data(t: float, y: Tensor, y0: Tensor) -> None:
            assert on_step is not None
            shift = self.data.shift
            on_step(t, self.process.from_log(y, t) - shift, self.process.from_log(y0, 0.0) - shift)

        y = sample(
            self.denoiser,
            solver=solver,
            steps=settings.steps if steps is None else steps,
            guidance=settings.guidance if guidance is None else guidance,
            grid=settings.grid if grid is None else grid,
            cond=cond,
            generator=generator,
            x_init=self._start(n, generator) if x_init is None else self._last(x_init),
            on_step=None if on_step is None else in_units_of_data,
        )
        return self._from_log(y)

    @torch.no_grad()
    def diffuse(self, x: Tensor, t: float | None = None, generator: Generators = None) -> Tensor:
        """Noisy data at a time, in units of the data.

        Args:
            x: data ``(batch, *shape)``.
            t: the time; ``None``: the last.
            generator: source of randomness.
        """
        x = self._positive(x)
        times = torch.full(x.shape[:1], self.process.t_max if t is None else t, device=x.device)
        return self.process.diffuse(x, draw_noise(x.shape, generator, x.device, x.dtype), times) - self.data.shift

    def log_prob(
        self,
        x: Tensor,
        cond: Any = None,
        *,
        steps: int = 100,
        grid: str | Grid | None = "karras",
        probes: int | None = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Log-density of data in nats, by the ODE from the data to the noise that sampling starts from.

        Args:
            x: data ``(batch, *shape)``.
            cond: what the model is told of them.
            steps: steps of the ODE, >= 1; each costs two calls of the network and their gradients.
            grid: where they lie.
            probes: random vectors of signs that estimate the divergence; ``None``: exactly, at a gradient a value.
            generator: source of the probes.

        Returns:
            ``(batch,)``, a density in units of the data.
        """
        self._check_moments()
        x = self._positive(x)
        _, scale = self.process.drift_and_scale(0.0, x)
        y = self.process.to_log(x, 0.0)
        nats = nll(
            self.denoiser, y, cond, steps=steps, grid=grid, probes=probes, generator=generator, prior=self._prior_nats
        )
        return -nats - (x * scale).log().flatten(1).sum(1)

    def _check_moments(self) -> None:
        if not self.network.log_count:
            rank_zero_warn(
                "the moments of the data are not known, so samples start from a wrong noise: fit the model, or call "
                "fit_moments first"
            )

    def _start(self, n: int, generator: Generators) -> Tensor:
        """Log-normal noise with the moments of the data at the last time, in ``y``."""
        self._check_moments()
        z = draw_noise((n, *self.shape), generator, self.device)
        return self.network.log_mean + self._last_spread(z) * z

    def _prior_nats(self, y: Tensor) -> Tensor:
        """Negative log-density of what :meth:`_start` draws."""
        spread = self._last_spread(y)
        squares = ((y - self.network.log_mean) / spread).square()
        return (0.5 * squares + 0.5 * math.log(2 * math.pi) + spread.log()).flatten(1).sum(1)

    def _last_spread(self, y: Tensor) -> Tensor:
        return self.network.spread(torch.tensor(self.process.t_max, device=y.device), y)

    def _last(self, x: Tensor) -> Tensor:
        return self.process.to_log(self._positive(x).to(self.device), self.process.t_max)

    def _from_log(self, y: Tensor) -> Tensor:
        x = self.process.from_log(y, 0.0)
        if self.data.range is None:
            return x - self.data.shift
        low, high = self.data.range
        self.clamped = ((x < low) | (x > high)).float().mean()
        return x.clamp(low, high) - self.data.shift

    def _positive(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must have shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        shifted = x + self.data.shift
        name = f"x + shift with shift={self.data.shift:g}" if self.data.shift else "x with shift=0"
        check_positive_data(shifted, name, "give PositiveData a larger shift, or drop such rows")
        return shifted

    def _log_clamped(self, stage: str) -> None:
        if self.clamped is not None:
            self.log(f"{stage}/clamped", self.clamped, sync_dist=True)
            self.clamped = None
