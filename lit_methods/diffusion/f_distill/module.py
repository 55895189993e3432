"""Distilling a diffusion teacher into a generator of one or a few steps, by any f-divergence.

Y. Xu, W. Nie and A. Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", arXiv 2502.15681, with
the choices of the authors' code (NVlabs/FastGen). It differs in this: gradients are taken at the student's samples and
then carried into the student, so that no critic ever has a gradient of a student's step; the approximate R1 penalty
moves the data before noise is added (theirs adds none); the reverse KL runs, and is DMD2; times are stratified.
"""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.f_distill.discriminator import FeatureDiscriminator, fitted_discriminator
from lit_methods.diffusion.f_distill.settings import (
    Critics,
    DensityRatio,
    check_networks,
    checked_guidance,
    checked_student_times,
    make_normalizer,
)
from lit_methods.diffusion.f_distill.weights import (
    Weight,
    check_divergence,
    divergence_weight,
    mean_logit,
    normalize_weight,
    vsd_loss,
)
from lit_methods.diffusion.predictions import combine, convert, point_at
from lit_methods.diffusion.pretrained import fingerprint
from lit_methods.diffusion.processes import Generators, Process, draw_noise, per_sample
from lit_methods.diffusion.sampling import OnStep
from lit_methods.diffusion.streams import check_seed, stream
from lit_methods.diffusion.time_samplers import KarrasTimes, TimeSampler, as_time_sampler
from lit_methods.diffusion.weightings import as_weighting
from lit_methods.hyperparameters import live_arguments
from lit_methods.lr_find import refuse_lr_finder
from lit_methods.optim.foundation.ranks import gather_objects, mean_over_ranks, world_size
from lit_methods.precision import load_unrounded


class FDistill(LightningModule):
    """Distil a diffusion model into a generator of one step, whose samples match the model's by an f-divergence.

    Use it for samples from one network call instead of 20 to 250. ``"rkl"`` is DMD2, which tends to drop modes;
    ``"js"`` and ``"kl"`` cover more of them at the same cost: all that differs is a weight for each sample, from the
    ratio of densities that the discriminator estimates.

    Both scores see samples of the *student*; data go to the discriminator only, and must be the teacher's. Iterations
    ``0, K, 2K, ...`` (``K = student_every``) step the student; all others step the fake score, which learns to denoise
    the student's samples, and the discriminator, on noisy samples. In a student's step at samples ``x``, noised to
    ``x_t``, the gradient is ``h(r) c (fake(x_t) - teacher(x_t))`` over the number of values, plus ``gan_weight`` times
    that of ``softplus(-logit)``; ``c`` is 1 over the mean ``|x - teacher(x_t)|`` of each sample.

    Manual optimization with the optimizers ``[student, fake score, discriminator]``: **``trainer.global_step`` counts
    the steps of all of them**, so that ``max_steps=20`` with ``K = 5`` ends after 12 batches. Stop by ``max_epochs`` or
    ``limit_train_batches``; ``iteration`` counts batches and is logged. ``SubmoduleEMA(target="student")`` averages
    after the student's steps only. The teacher is not in checkpoints; a hash of its weights is, and training resumes
    with the same teacher only.

    Under DDP gradients are averaged here, after each backward pass, so that any DDP strategy will do; sharded
    strategies, float16 and ``accumulate_grad_batches`` are refused. Random numbers depend on (seed, rank, iteration).
    No host synchronisation in a step.

    Logs ``train/`` (at every ``log_every_n_steps``-th iteration) ``vsd``, which says nothing of quality, ``gan``,
    ``fake_score``, ``discriminator``, ``disc_accuracy``; ``score_gap``, the mean ``|fake - teacher|``; ``ratio_mean``,
    ``ratio_clipped`` (share) and ``weight_max``; ``grad_vsd`` and ``grad_gan``, norms of the two gradients at the
    samples, whose quotient is a ``gan_weight`` to start from; ``iteration``. Validation and test log nothing: use
    :class:`~lit_methods.callbacks.SampleQuality`. Prediction makes a sample for each row of the batch.

    Cost of ``K`` iterations: one forward and backward pass of the student, one forward pass of fake score and teacher
    (guidance: two of the teacher) and one backward pass through the teacher up to the features; and ``K - 1`` times a
    forward pass of the student, a forward and backward pass of the fake score, and two of the teacher up to the
    features.

    Example:
        >>> from lit_methods.diffusion import Denoiser, FDistill, TimeMLP
        >>> teacher = Denoiser(TimeMLP([1, 8, 8]), "edm", "edm", "edm")  # trained
        >>> model = FDistill(teacher, divergence="js")

    Args:
        teacher: a trained denoiser; frozen.
        student: the generator, whose predicted clean sample at the noisiest time is its sample; ``None``: a copy of the
            teacher. Give a trained one for a warm start.
        fake_score: denoiser of the student's samples; ``None``: a copy of the teacher.
        discriminator: a :class:`FeatureDiscriminator`, or any network of ``(x_t, t)``, with ``cond`` as third argument
            for a conditional teacher, that gives logits ``(batch,)`` or ``(batch, heads)``, positive for data;
            ``None``: a :class:`FeatureDiscriminator` of the layers that the teacher's network names itself.
        divergence: ``rkl softened_rkl js squared_hellinger kl jeffreys neyman``, or ``h(r) = r^2 f''(r)`` as a
            function.
        gan_weight: weight of the generator's adversarial loss, >= 0; 0 only for ``rkl``, which then needs no
            discriminator.
        student_every: ``K``, >= 2.
        student_times: falling times at which a student of several steps is called, the first that of pure noise; it
            learns from data noised to them. ``None``: that one time, one step.
        guidance_scale: of the teacher, as ``null + scale (told - null)``; 1 or ``None``: none. DMD2's is this minus 1.
        time_sampler: noise levels at which the distributions are matched, an object or a name as in
            :class:`~lit_methods.diffusion.Diffusion`; default: 997 of the 1000 points of Karras et al.'s grid.
        ratio: how the discriminator's logits become weights.
        critics: how fake score and discriminator learn.
        grad_norm: ``"dmd"``, or ``"none"`` for ``c = 1``.
        grad_clip: largest norm of the student's gradient, > 0; ``None``: no limit.
        optimizer: builds the student's optimizer.
        critic_optimizer: builds those of fake score and discriminator; ``None``: as ``optimizer``.
        lr_scheduler: builds a learning rate scheduler for each optimizer, stepped when it steps.
        seed: of times and noise, >= 0; ``None`` draws one from torch's generator.

    Attributes:
        iteration: batches so far, an int64 buffer.

    Raises:
        ValueError: an argument out of range; networks that do not fit each other; when training starts, a precision or
            strategy that is refused, or another teacher than the checkpoint's; a batch without a condition.
    """

    iteration: Tensor

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser | None = None,
        fake_score: Denoiser | None = None,
        discriminator: nn.Module | None = None,
        divergence: str | Weight = "js",
        gan_weight: float = 1e-3,
        student_every: int = 5,
        student_times: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        time_sampler: str | TimeSampler | None = None,
        ratio: DensityRatio | None = None,
        critics: Critics | None = None,
        grad_norm: Literal["dmd", "none"] = "dmd",
        grad_clip: float | None = 10.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        critic_optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.automatic_optimization = False
        check_divergence(divergence)
        if not 0 <= gan_weight < math.inf:
            raise ValueError(f"gan_weight must be >= 0 and finite, got {gan_weight}")
        if gan_weight == 0 and divergence != "rkl":
            raise ValueError(
                f"gan_weight must be > 0 for divergence={divergence!r}, whose ratios a discriminator estimates, got 0"
            )
        if student_every < 2:
            raise ValueError(f"student_every must be >= 2, got {student_every}")
        if grad_norm not in ("dmd", "none"):
            raise ValueError(f"grad_norm must be 'dmd' or 'none', got {grad_norm!r}")
        if grad_clip is not None and not 0 < grad_clip < math.inf:
            raise ValueError(f"grad_clip must be > 0 and finite, got {grad_clip}")
        self.divergence, self.gan_weight, self.student_every = divergence, gan_weight, student_every
        self.guidance_scale = checked_guidance(guidance_scale, teacher)
        self.time_sampler = KarrasTimes(skip=0.002) if time_sampler is None else as_time_sampler(time_sampler)
        self.ratio, self.critics = ratio or DensityRatio(), critics or Critics()
        self.grad_norm, self.grad_clip = grad_norm, grad_clip
        self.optimizer, self.critic_optimizer, self.lr_scheduler = (
            optimizer,
            critic_optimizer or optimizer,
            lr_scheduler,
        )
        # In a tuple the teacher is no part of the module: not saved, not trained, not wrapped by DDP.
        self._teacher = (teacher,)
        self.student = copy.deepcopy(teacher).requires_grad_(True) if student is None else student
        self.fake_score = copy.deepcopy(teacher).requires_grad_(True) if fake_score is None else fake_score
        check_networks(teacher, self.student, self.fake_score)
        teacher.eval().requires_grad_(False)
        process = teacher.process
        self.student_times = checked_student_times(student_times, process)
        if gan_weight == 0 and discriminator is not None:
            raise ValueError(f"discriminator must be None with gan_weight=0, got {type(discriminator).__name__}")
        self.discriminator = None if gan_weight == 0 else fitted_discriminator(discriminator, self._trunk())
        self.normalizer, self._place = make_normalizer(self.ratio, process, self.time_sampler)
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))
        self.seed = check_seed(seed)
        self.sample_shape = teacher.sample_shape
        self._next = 0  # the iteration, known without asking the device
        self._shown: dict[str, Tensor] = {}  # the last of every logged value
        self._hash: str | None = None
        self._saved_hash: str | None = None

    @property
    def teacher(self) -> Denoiser:
        """The frozen teacher."""
        return self._teacher[0]

    @property
    def denoiser(self) -> Denoiser:
        """The student, under the name that callbacks know."""
        return self.student

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The student's clean sample for noisy ``x`` at times ``t``."""
        return self.student.x0(x, t, cond)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        cond: Any = None,
        *,
        generator: Generators = None,
        x_init: Tensor | None = None,
        shape: Sequence[int] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Make samples: one network call, or one for each of ``student_times``.

        Args:
            n: number of samples, >= 1.
            cond: one condition per sample.
            generator: source of randomness; a list has one for each sample.
            x_init: noise to start from.
            shape: of one sample; default: that of the teacher's network or of the training data.
            on_step: called with the time, the noisy samples there and the clean ones.

        Raises:
            ValueError: an argument out of range, or no shape is known.
        """
        shape = self.sample_shape if shape is None else shape
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}")
        if x_init is None:
            if shape is None:
                raise ValueError("shape must be given before the model was trained, got None")
            x_init = self.teacher.process.prior_std * draw_noise([n, *shape], generator, self.device)
        x = clean = x_init
        for t in self.student_times:
            if t != self.student_times[0]:
                point = point_at(self.teacher.process, t, x)
                x = point.alpha * clean + point.sigma * draw_noise(x.shape, generator, x.device, x.dtype)
            clean = self.student.x0(x, t, cond)
            if on_step is not None:
                on_step(t, x, clean)
        return clean

    def to_pipeline(self, folder: str | Path) -> None:
        """Write the one-step student as a folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads.

        See :func:`~lit_methods.diffusion.to_one_step_pipeline`.

        Raises:
            ValueError: a student of several steps, or one for which diffusers has no pipeline.
            ImportError: diffusers is missing.
        """
        from lit_methods.diffusion.diffusers_models import to_one_step_pipeline

        if len(self.student_times) > 1:
            raise ValueError(f"student_times must be one time for a pipeline of one step, got {self.student_times}")
        to_one_step_pipeline(self.student, folder)

    def setup(self, stage: str) -> None:
        """Refuse what training cannot do."""
        if stage != "fit":
            return
        trainer = self.trainer
        if trainer.precision in ("16-mixed", "16-true"):
            raise ValueError(
                f"precision must be 32, 64 or bf16 for FDistill, got {trainer.precision!r}: use bf16-mixed"
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"strategy must be one device or ddp for FDistill, got {type(trainer.strategy).__name__}: its networks "
                "are stepped apart"
            )

    def on_fit_start(self) -> None:
        """Compare the teacher with that of the checkpoint, and with those of the other ranks."""
        if self._saved_hash not in (None, self.teacher_hash()):
            raise ValueError(
                f"teacher must be the one that the checkpoint was trained with, of hash {self._saved_hash}, got one of "
                f"hash {self.teacher_hash()}"
            )
        if len(hashes := set(gather_objects(self.teacher_hash()))) > 1:
            raise ValueError(f"teacher must be the same on all ranks, got weights of hashes {sorted(hashes)}")

    def on_train_start(self) -> None:
        """Refuse Lightning's search for a learning rate, and read the counter once."""
        refuse_lr_finder(self)
        self._next = int(self.iteration)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Step the student, or else fake score and discriminator."""
        x, cond = self._split(batch)
        if self.sample_shape is None:
            self.sample_shape = list(x.shape[1:])
        k, generator = self._next, self._stream("train", self._next)
        is_students = k % self.student_every == 0
        for critic in (self.fake_score, self.discriminator):
            if critic is not None and critic.training is is_students:
                critic.train(not is_students)  # no dropout where critics are asked
        values = self._step_student(x, cond, generator) if is_students else self._step_critics(x, cond, generator)
        self._next += 1
        self.iteration += 1
        self._shown |= values
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.trainer.is_last_batch or (every > 0 and (k + 1) % every == 0):
            shown = {f"train/{name}": value.to(self.device) for name, value in self._shown.items()}
            self.log_dict({**shown, "train/iteration": float(k + 1)}, batch_size=len(x))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: callbacks compare samples."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: callbacks compare samples."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """A sample for each row of the batch."""
        x, cond = self._split(batch)
        generator = self._stream("predict", dataloader_idx, batch_idx)
        return self.sample(len(x), cond, generator=generator, shape=x.shape[1:])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """An optimizer, and a schedule if there is one, for student, fake score and discriminator."""
        builders = [self.optimizer, self.critic_optimizer, self.critic_optimizer]
        optimizers = [
            build(p for p in part.parameters() if p.requires_grad)
            for build, part in zip(builders, self._parts(), strict=False)
        ]
        if self.lr_scheduler is None:
            return optimizers
        return optimizers, [self.lr_scheduler(optimizer) for optimizer in optimizers]

    def teacher_hash(self) -> str:
        """A hash of the teacher's weights, process and prediction."""
        if self._hash is None:
            self._hash = fingerprint(self.teacher)
        return self._hash

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what random numbers depend on, the teacher's hash, and the logged values."""
        checkpoint["f_distill"] = {
            "seed": self.seed,
            "sample_shape": self.sample_shape,
            "teacher_hash": self.teacher_hash(),
            "shown": {name: value.cpu() for name, value in self._shown.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the saved seed."""
        saved = checkpoint["f_distill"]
        self.seed, self.sample_shape = saved["seed"], saved["sample_shape"]
        self._saved_hash, self._shown = saved["teacher_hash"], dict(saved["shown"])

    def _step_student(self, x: Tensor, cond: Any, generator: torch.Generator) -> dict[str, Tensor]:
        start, began = self._start(x, generator)
        samples = self.student.x0(start, began, cond)
        leaf = samples.detach().to(x.dtype).requires_grad_()
        t, eps = self._draw(x, generator)
        found = self._ask_critics(_noised(self.teacher.process, leaf, eps, t), t, cond)
        values: dict[str, Tensor] = {"score_gap": (found.fake - found.real).abs().mean()}
        weight = None
        if found.logits is not None and self.divergence != "rkl":
            weight = divergence_weight(self.normalizer(found.logits, self._place(t)), self.divergence)
            weight = normalize_weight(weight) if self.ratio.normalize else weight
            raw = mean_logit(found.logits.detach()).exp()
            inside = raw.clamp(*self.ratio.clip)
            values |= {
                "ratio_mean": inside.mean(),
                "ratio_clipped": (raw != inside).float().mean(),
                "weight_max": weight.max(),
            }
        vsd = vsd_loss(leaf, found.real, found.fake, weight, self.grad_norm)
        (gradient,) = torch.autograd.grad(vsd, leaf)
        values |= {"vsd": vsd, "grad_vsd": gradient.norm()}
        if found.logits is not None:
            gan = softplus(-found.logits).mean()
            (from_gan,) = torch.autograd.grad(gan, leaf)
            gradient = gradient + self.gan_weight * from_gan
            values |= {"gan": gan, "grad_gan": from_gan.norm()}
        torch.autograd.backward(samples, gradient.to(samples.dtype))
        self._step(0, self.grad_clip)
        return {name: value.detach() for name, value in values.items()}

    def _step_critics(self, x: Tensor, cond: Any, generator: torch.Generator) -> dict[str, Tensor]:
        process, kind = self.teacher.process, self.fake_score.prediction
        with torch.no_grad():
            samples = self.student.x0(*self._start(x, generator), cond).to(x.dtype)
            t, eps = self._draw(x, generator)
            noisy = _noised(process, samples, eps, t)
            target = combine(samples, eps, kind, point_at(process, t, x), self.fake_score.sigma_data)
        squares = (self.fake_score(noisy, t, cond) - target).square().flatten(1).mean(1)
        weight = as_weighting(self.critics.fake_weighting).in_space(kind, process, t, self.fake_score.sigma_data)
        loss = (weight * squares).mean()
        values = {"fake_score": loss.detach()}
        if self.discriminator is not None:
            t_real, eps_real = (t, eps) if self.critics.same_noise else self._draw(x, generator)
            batches = [(noisy, t), (_noised(process, x, eps_real, t_real), t_real)]
            if self.critics.r1_weight > 0:
                nudge = self.critics.r1_noise * draw_noise(x.shape, generator, x.device, x.dtype)
                batches.append((_noised(process, x + nudge, eps_real, t_real), t_real))
            together, times = (torch.cat(parts) for parts in zip(*batches, strict=True))
            logits = self._logits(together, times, None if cond is None else torch.cat([cond] * len(batches)))
            fake, real, *nudged = logits.chunk(len(batches))
            adversarial = softplus(fake).mean() + softplus(-real).mean()
            if nudged:
                adversarial = adversarial + self.critics.r1_weight * mse_loss(real, nudged[0])
            loss = loss + adversarial
            accuracy = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
            values |= {"discriminator": adversarial.detach(), "disc_accuracy": accuracy}
        loss.backward()
        for i in range(1, len(self._parts())):
            self._step(i)
        return values

    def _ask_critics(self, x: Tensor, t: Tensor, cond: Any) -> "_Found":
        """Clean samples of teacher and fake score, without gradient, and logits with that of ``x``."""
        reads_features = isinstance(self.discriminator, FeatureDiscriminator)
        features, clean = None, {}
        for model in (self.teacher, self.fake_score):
            if reads_features and model is self._trunk():
                out, features = model.with_features(x, t, self._layers(), cond)
            else:
                with torch.no_grad():
                    out = model(x, t, cond)
            if model is self.teacher and self.guidance_scale != 1:
                assert model.conditioning is not None
                with torch.no_grad():
                    out = torch.lerp(model(x, t, model.conditioning.null(cond)), out.detach(), self.guidance_scale)
            args = (x.detach(), t, model.prediction, "x0", model.process, model.sigma_data)
            clean[model] = convert(out.detach(), *args).to(x.dtype)
        logits = None
        if features is not None:
            assert self.discriminator is not None
            logits = self.discriminator(features)
        elif self.discriminator is not None:
            logits = self._logits(x, t, cond)
        return _Found(clean[self.teacher], clean[self.fake_score], logits)

    def _logits(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        assert self.discriminator is not None
        if not isinstance(self.discriminator, FeatureDiscriminator):
            return self.discriminator(x, t) if cond is None else self.discriminator(x, t, cond)
        with torch.set_grad_enabled(self._trunk() is not self.teacher):
            features = self._trunk().features(x, t, self._layers(), cond)
        return self.discriminator(features)

    def _trunk(self) -> Denoiser:
        return self.teacher if self.critics.discriminator_features == "teacher" else self.fake_score

    def _layers(self) -> list[str] | None:
        assert isinstance(self.discriminator, FeatureDiscriminator)
        return self.discriminator.layers

    def _start(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the student is given, and its time: noise, or data with noise."""
        noise = draw_noise(x.shape, generator, x.device, x.dtype)
        # Filled on the device, since a copy to it would wait.
        filled = [torch.full((), t, device=x.device, dtype=_time_dtype(x)) for t in self.student_times]
        if len(filled) == 1:
            return self.teacher.process.prior_std * noise, filled[0].expand(len(x))
        times = torch.stack(filled)
        index = torch.randint(len(times), x.shape[:1], generator=generator, device=x.device)
        point = self.teacher.process.at(times[index])
        alpha = torch.where(index == 0, 0.0, point.alpha)  # the first is pure noise, as samples start from
        return (per_sample(alpha, x) * x + per_sample(point.sigma, x) * noise).to(x.dtype), times[index]

    def _draw(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        process = self.teacher.process
        t = self.time_sampler.sample(len(x), process, generator, x.device, _time_dtype(x), stratified=True)
        return t, draw_noise(x.shape, generator, x.device, x.dtype)

    def _step(self, which: int, clip: float | None = None) -> None:
        """Average gradients over ranks, clip them, step the optimizer and its schedule, and forget the gradients."""
        parameters = [p for p in self._parts()[which].parameters() if p.grad is not None]
        if world_size() > 1:
            means = mean_over_ranks([p.grad for p in parameters if p.grad is not None])
            for p, mean in zip(parameters, means, strict=True):
                p.grad = mean
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizers: Any = self.optimizers()
        optimizers[which].step()
        optimizers[which].zero_grad()
        schedulers: Any = self.lr_schedulers()
        if schedulers is not None:
            schedulers[which].step()

    def _parts(self) -> list[nn.Module]:
        return [part for part in (self.student, self.fake_score, self.discriminator) if part is not None]

    def _split(self, batch: Any) -> tuple[Tensor, Any]:
        x = batch if isinstance(batch, Tensor) else batch[0]
        if self.teacher.conditioning is None:
            return x, None
        if isinstance(batch, Tensor) or len(batch) < 2:
            raise ValueError(
                "the batch must be (x, y) with a condition y, as the teacher has a conditioning, got x only"
            )
        self.teacher.conditioning.check(batch[1])
        return x, batch[1]

    def _stream(self, *place: int | str) -> torch.Generator:
        rank = 0 if self._trainer is None else self.trainer.global_rank
        return stream(self.device, self.seed, rank, *place)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FDistill":
        """Move the teacher along."""
        self._hash = None
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)


class _Found(NamedTuple):
    real: Tensor
    fake: Tensor
    logits: Tensor | None


def _noised(process: Process, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Noisy samples, computed in float64 where the device has it."""
    if x0.device.type == "mps":
        return process.add_noise(x0, eps, t)
    return process.add_noise(x0.double(), eps.double(), t.double()).to(x0.dtype)


def _time_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
