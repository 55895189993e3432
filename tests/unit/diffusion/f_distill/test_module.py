"""What a student, its critics and their counters do, against updates written out by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.functional import softplus

from lit_methods.batches import SupervisedBatch
from lit_methods.callbacks import SubmoduleEMA
from lit_methods.datamodules import TensorDataModule
from lit_methods.diffusion import (
    Critics,
    Denoiser,
    DensityRatio,
    FDistill,
    FeatureDiscriminator,
    Labels,
    PointDiscriminator,
    TimeMLP,
    TimeSampler,
    affine_generator,
    gaussian_mixture,
)
from lit_methods.diffusion.f_distill import module as module_under_test
from lit_methods.diffusion.processes import draw_noise
from lit_methods.diffusion.streams import stream
from tests.unit.diffusion.test_diffusion import QUIET

N, DIM = 8, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.1)


def mlp_denoiser(classes: int | None = None) -> Denoiser:
    conditioning = None if classes is None else Labels(classes)
    return Denoiser(TimeMLP([DIM], width=8, num_classes=classes), "edm", "edm", "edm", conditioning=conditioning)


def distill(**arguments: Any) -> FDistill:
    return FDistill(**{"teacher": mlp_denoiser(), "seed": 0, "optimizer": sgd} | arguments)


def data(batches: int = 100, x: Tensor | None = None) -> TensorDataModule:
    x = torch.randn(N * batches, DIM) if x is None else x
    rows = SupervisedBatch(x, torch.arange(len(x)) % 2)
    return TensorDataModule(train=rows, val=rows, test=rows, batch_size=N)


def fit(module: FDistill, batches: int, rows: TensorDataModule | None = None, **settings: Any) -> Trainer:
    trainer = Trainer(
        **QUIET | {"max_epochs": 1, "limit_train_batches": batches, "limit_val_batches": 0, "log_every_n_steps": 1}
        | settings
    )  # fmt: skip
    trainer.fit(module, rows or data(batches))
    return trainer


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class At(TimeSampler):
    """One time for all."""

    def __init__(self, t: float) -> None:
        self.t = t

    def quantile(self, u: Tensor, process: Any) -> Tensor:
        return torch.full_like(u, self.t)


class Constant(nn.Module):
    """A denoiser's network that gives the same clean sample everywhere, or one for each label."""

    def __init__(self, *values: float, trainable: bool = True) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values), requires_grad=trainable)
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls.append(x.detach())
        return self.values[torch.zeros(len(x), dtype=torch.long) if cond is None else cond][:, None].expand_as(x)


def constants(teacher: list[float], student: float, fake: float, **arguments: Any) -> FDistill:
    """All three networks constant, and nothing but the difference of the scores in the gradient."""
    conditioning = Labels(len(teacher) - 1) if len(teacher) > 1 else None

    def denoiser(*values: float) -> Denoiser:
        values = values if conditioning is None else values * len(teacher) if len(values) == 1 else values
        return Denoiser(Constant(*values), "edm", "x0", conditioning=conditioning)

    settings = {"divergence": "rkl", "gan_weight": 0.0, "grad_norm": "none", "grad_clip": None}
    return distill(
        teacher=denoiser(*teacher), student=denoiser(student), fake_score=denoiser(fake), **settings | arguments
    )


def test_every_kth_batch_is_the_students_and_schedules_step_with_their_optimizers() -> None:
    average = SubmoduleEMA("student", decays=[0.9])
    module = distill(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 100))
    trainer = fit(module, 23, callbacks=[average])
    assert [scheduler.last_epoch for scheduler in module.lr_schedulers()] == [5, 18, 18]
    assert int(module.iteration) == 23
    assert trainer.global_step == 5 + 18 + 18, "Lightning counts all optimizers"
    assert average.steps == 5, "averages move with the student only"
    assert float(trainer.callback_metrics["train/iteration"]) == 23


def test_max_steps_counts_all_optimizers_as_documented() -> None:
    module = distill()
    fit(module, 100, max_steps=20)
    assert int(module.iteration) == 12


def test_a_step_moves_its_own_networks_only_and_leaves_no_gradients() -> None:
    module = distill(teacher=mlp_denoiser(), student_every=2)
    parts = {"student": module.student, "fake": module.fake_score, "disc": module.discriminator}
    before = {name: weights(part) for name, part in parts.items()}
    teacher = weights(module.teacher)
    trainer = fit(module, 1)
    assert [same(weights(part), before[name]) for name, part in parts.items()] == [False, True, True]
    assert not module.fake_score.training, "no dropout where critics are asked"
    assert all(p.grad is None for p in [*module.parameters(), *module.teacher.parameters()])
    before = {name: weights(part) for name, part in parts.items()}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data(1))
    assert [same(weights(part), before[name]) for name, part in parts.items()] == [True, False, False]
    assert module.fake_score.training
    assert all(p.grad is None for p in module.parameters())
    assert same(weights(module.teacher), teacher)


@pytest.mark.parametrize("divergence", ["rkl", "js"])
def test_the_students_step_is_that_of_one_loss(divergence: str) -> None:
    """DMD2's for the reverse KL, bit for bit; for others each sample's difference has its weight besides."""
    gan = 2.0**-10  # a power of two, by which nothing is rounded
    module = distill(divergence=divergence, gan_weight=gan, grad_clip=None)
    nn.init.normal_(module.fake_score.net.out[-1].weight)
    by_hand = copy.deepcopy(module)
    fit(module, 1)
    student, fake, teacher = by_hand.student, by_hand.fake_score, by_hand.teacher
    generator = stream("cpu", 0, 0, "train", 0)
    start = 80.0 * draw_noise([N, DIM], generator)
    x = student.x0(start, torch.full((N,), 80.0))
    t = by_hand.time_sampler.sample(N, teacher.process, generator, stratified=True)
    noisy = (x.double() + t.double()[:, None] * draw_noise([N, DIM], generator).double()).float()
    logits = by_hand.discriminator(teacher.features(noisy, t))
    with torch.no_grad():
        real, guess = teacher.x0(noisy, t), fake.x0(noisy, t)
        r = by_hand.normalizer(logits, t)
        h = torch.ones(N) if divergence == "rkl" else r / (1 + r) / ((r / (1 + r)).mean() + 1e-6)
        c = h / ((x - real).abs().mean(1) + 1e-6)
        target = x - c[:, None] * (guess - real)
    loss = 0.5 * nn.functional.mse_loss(x, target) + gan * softplus(-logits).mean()
    optimizer = sgd(student.parameters())
    loss.backward()
    optimizer.step()
    if divergence == "rkl":
        assert same(weights(student), weights(module.student))
    for got, expected in zip(weights(module.student), weights(student), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("gan_weight", [0.0, 1.0])
def test_the_gan_reaches_the_student_through_frozen_critics(gan_weight: float) -> None:
    """Where fake score and teacher agree, as in the first step, only the discriminator pulls."""
    module = distill(divergence="rkl", gan_weight=gan_weight)
    before = weights(module.student)
    trainer = fit(module, 1)
    assert float(trainer.callback_metrics["train/score_gap"]) == 0
    assert same(weights(module.student), before) == (gan_weight == 0)


def test_guidance_is_null_plus_scale_times_the_difference() -> None:
    """Told 2, null 1, scale 3: the teacher says 4; a student at 0 with a fake score at 0 moves by -lr (0 - 4)."""
    moved = {}
    for scale in (None, 1.0, 3.0):
        module = constants([2.0, 2.0, 1.0], 0.0, 0.0, guidance_scale=scale)
        fit(module, 1)
        moved[scale] = float(module.student.net.values.detach().sum())
        assert len(module.teacher.net.calls) == (2 if scale == 3.0 else 1)
    assert moved[None] == moved[1.0] == pytest.approx(0.2)
    assert moved[3.0] == pytest.approx(0.4)


def test_both_scores_see_samples_of_the_student_and_never_data() -> None:
    module = constants([1.0], 0.0, 0.0, time_sampler=At(0.5), gan_weight=1e-3, discriminator=PointDiscriminator(DIM))
    fit(module, 1, data(x=torch.full((N, DIM), 1e6)))
    seen = torch.cat(module.teacher.net.calls + module.fake_score.net.calls)
    assert len(seen) == 2 * N
    assert float(seen.abs().max()) < 10


def test_a_student_that_is_the_teachers_distribution_stays() -> None:
    """p = q: with an exact fake score the gradient is nothing but rounding."""
    args: dict[str, Any] = {"sigma_min": 0.01, "sigma_max": 2.0}
    module = distill(
        teacher=gaussian_mixture([[0.3]], [0.7], **args),
        student=affine_generator([0.3], 0.7, **args),
        fake_score=gaussian_mixture([[0.3]], [0.7], trainable=True, **args),
        divergence="rkl",
        gan_weight=0.0,
    )
    before = weights(module.student)
    trainer = fit(module, 1, data(x=torch.randn(N, 1)))
    assert float(trainer.callback_metrics["train/score_gap"]) < 1e-6
    torch.testing.assert_close(weights(module.student), before, rtol=0, atol=1e-5)


def test_the_discriminator_finds_the_ratio_of_two_gaussians() -> None:
    args: dict[str, Any] = {"sigma_min": 0.1, "sigma_max": 2.0}
    module = distill(
        teacher=gaussian_mixture([[0.0]], [1.0], **args),
        student=affine_generator([0.4], 0.8, **args),
        fake_score=gaussian_mixture([[0.0]], [1.0], trainable=True, **args),
        discriminator=PointDiscriminator(1),
        student_every=1000,
        time_sampler="lambda_uniform",
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-9),
        critic_optimizer=lambda params: torch.optim.Adam(params, lr=1e-2),
    )
    x = torch.randn(512 * 300, 1)
    rows = TensorDataModule(train=SupervisedBatch(x, torch.zeros(len(x), dtype=torch.long)), batch_size=512)
    fit(module, 300, rows, log_every_n_steps=1000)
    at, t = torch.linspace(-2, 2, 41)[:, None], torch.full((41,), 0.5)
    p, q = (torch.distributions.Normal(m, (s**2 + 0.25) ** 0.5) for m, s in ((0.0, 1.0), (0.4, 0.8)))
    assert module.discriminator is not None
    error = module.discriminator(at, t).detach() - (p.log_prob(at) - q.log_prob(at))[:, 0]
    assert float(error.square().mean().sqrt()) < 0.15


def test_the_fake_score_is_a_plain_mean_square_of_the_students_samples() -> None:
    """A constant c for samples at 0: its loss is c squared, or Karras et al.'s weight times that."""
    for weighting, factor in (("uniform", 1.0), ("edm", (0.5**2 + 0.5**2) / 0.5**4)):
        critics = Critics(fake_weighting=weighting)
        module = constants(
            [1.0], 0.0, 3.0, time_sampler=At(0.5), critics=critics, optimizer=lambda p: torch.optim.SGD(p, 0.0)
        )
        trainer = fit(module, 2)
        assert float(trainer.callback_metrics["train/fake_score"]) == pytest.approx(9 * factor)


class Linear(nn.Module):
    """Logits that are the sum of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * x.sum(1, keepdim=True)


def test_r1_is_the_squared_difference_of_logits_of_nudged_data() -> None:
    losses = []
    for r1_weight in (0.0, 100.0):
        module = constants(
            [1.0], 0.0, 0.0, gan_weight=1e-3, discriminator=Linear(), time_sampler=At(0.5),
            critics=Critics(r1_weight=r1_weight, r1_noise=0.1), optimizer=lambda p: torch.optim.SGD(p, 0.0),
        )  # fmt: skip
        x = torch.zeros(4000, DIM)
        rows = TensorDataModule(train=SupervisedBatch(x, torch.zeros(len(x), dtype=torch.long)), batch_size=2000)
        losses.append(float(fit(module, 2, rows).callback_metrics["train/discriminator"]))
    # The nudge changes a logit by a normal number of variance DIM * 0.1^2.
    assert losses[1] - losses[0] == pytest.approx(100 * DIM * 0.01, rel=0.1)


def test_data_may_get_the_noise_of_the_samples() -> None:
    """With samples and data both 0, same times and noise make both logits equal."""
    module = constants(
        [1.0], 0.0, 0.0, gan_weight=1e-3, discriminator=Linear(), critics=Critics(same_noise=True),
        optimizer=lambda p: torch.optim.SGD(p, 0.0),
    )  # fmt: skip
    trainer = fit(module, 2, data(x=torch.zeros(2 * N, DIM)))
    assert float(trainer.callback_metrics["train/disc_accuracy"]) == 0.5


def test_dmd2s_discriminator_trains_the_trunk_that_it_reads() -> None:
    """Where the fake score's own loss is without weight, its weights move by the discriminator's loss alone."""
    gradients = []
    for features in ("teacher", "fake_score"):
        module = distill(critics=Critics(discriminator_features=features), optimizer=lambda p: torch.optim.SGD(p, 1.0))
        module.discriminator.requires_grad_(True)
        before = module.fake_score.net.inner.weight.detach().clone()
        fit(module, 2)
        gradients.append(module.fake_score.net.inner.weight.detach() - before)
        torch.manual_seed(0)
    assert not torch.equal(*gradients)


def test_students_of_several_steps_start_from_noisy_data_and_add_fresh_noise() -> None:
    module = constants([1.0], 0.0, 0.0, student_times=[80.0, 2.0])
    fit(module, 1, data(x=torch.full((N, DIM), 1e6)))
    given = module.student.net.calls[-1].abs().amax(1)
    noise, noisy = (given < 1e3).sum(), (given > 1e5).sum()
    assert noise > 0
    assert noisy > 0
    assert noise + noisy == N, "pure noise at the first time, noisy data at the second"
    times: list[float] = []
    out = module.sample(5, on_step=lambda t, x, clean: times.append(t), generator=torch.Generator().manual_seed(0))
    assert times == [80.0, 2.0]
    assert out.shape == (5, DIM)
    last = module.student.net.calls[-1]
    assert 1 < float(last.std()) < 3, "noise of deviation 2 around the student's constant"


def test_one_step_is_one_network_call_and_a_function_of_the_generator() -> None:
    module = constants([1.0], 0.5, 0.0)
    module.sample_shape = [DIM]
    assert torch.equal(module.sample(4), torch.full((4, DIM), 0.5))
    assert len(module.student.net.calls) == 1
    noise = [module.student.net.calls[0]]
    for _ in range(2):
        module.sample(4, generator=torch.Generator().manual_seed(3))
        noise.append(module.student.net.calls[-1])
    assert torch.equal(noise[1], noise[2])
    assert 30 < float(noise[0].std()) < 150


@pytest.mark.parametrize("spacing", ["time", "log_sigma", "quantile"])
def test_ratios_are_scaled_in_bins_of_any_spacing(spacing: Any) -> None:
    module = distill(ratio=DensityRatio(spacing=spacing, bins=4), divergence="kl")
    fit(module, 1)
    assert module.normalizer.means.shape == (4,)
    t = module.time_sampler.sample(4000, module.teacher.process)
    module.normalizer(torch.zeros(4000), module._place(t))
    place = (module._place(t), module.normalizer)
    edges = {"time": (0.002, 80.0), "log_sigma": (0.002, 80.0), "quantile": (0.0, 1.0)}[spacing]
    assert (place[1].t_min, place[1].t_max) == pytest.approx(edges)
    if spacing == "quantile":
        shares = torch.bincount((place[0] * 4).long(), minlength=4) / 4000
        torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.04)


def test_the_teacher_is_not_in_checkpoints_but_its_hash_is(tmp_path: Any) -> None:
    torch.manual_seed(1)
    teacher = mlp_denoiser()
    trainer = fit(distill(teacher=teacher), 3)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert not any("teacher" in name for name in saved["state_dict"])
    again = distill(teacher=copy.deepcopy(teacher))
    Trainer(**QUIET, max_epochs=2, limit_val_batches=0).fit(again, data(3), ckpt_path=path)
    assert int(again.iteration) == 6
    other = distill(teacher=mlp_denoiser())
    with pytest.raises(ValueError, match=r"teacher must be the one that the checkpoint .* of hash .*, got one of hash"):
        Trainer(**QUIET, max_epochs=2).fit(other, data(3), ckpt_path=path)
    loaded = FDistill.load_from_checkpoint(path, teacher=mlp_denoiser())
    torch.testing.assert_close(weights(loaded.student), [t for n, t in saved["state_dict"].items() if "student" in n])


def test_everything_that_tells_of_progress_is_logged() -> None:
    logged = set(fit(distill(), 2).callback_metrics)
    names = (
        "vsd gan fake_score discriminator disc_accuracy score_gap ratio_mean ratio_clipped weight_max grad_vsd "
        "grad_gan iteration"
    )
    assert logged == {f"train/{name}" for name in names.split()}


def test_what_is_not_finite_is_seen() -> None:
    trainer = fit(constants([1.0], 0.0, float("inf")), 1)
    assert not trainer.callback_metrics["train/vsd"].isfinite()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"precision": "16-true"}, ValueError, "precision must be 32, 64 or bf16 for FDistill, got '16-true'"),
        ({"accumulate_grad_batches": 2}, MisconfigurationException, "accumulate_grad_batches"),
        ({"gradient_clip_val": 1.0}, MisconfigurationException, "gradient_clip_val"),
    ],
)
def test_what_a_trainer_cannot_do_is_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(distill(), 1, **settings)


def test_a_conditional_teacher_needs_labels() -> None:
    module = distill(teacher=mlp_denoiser(2))
    rows = torch.utils.data.DataLoader(torch.randn(N, DIM), batch_size=N)
    with pytest.raises(ValueError, match="the teacher has a conditioning, got x only"):
        Trainer(**QUIET, max_epochs=1).fit(module, rows)
    predictions = Trainer(**QUIET).predict(module, data(2))
    assert predictions is not None
    assert torch.cat(predictions).shape == (2 * N, DIM)


def same_network_twice() -> FDistill:
    teacher = mlp_denoiser()
    return distill(teacher=teacher, student=teacher)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: distill(divergence="chi2"), r"divergence must be one of.*'neyman'"),
        (lambda: distill(gan_weight=0.0), r"gan_weight must be > 0 for divergence='js'"),
        (lambda: distill(gan_weight=-1.0), "gan_weight must be >= 0 and finite, got -1.0"),
        (lambda: distill(student_every=1), "student_every must be >= 2, got 1"),
        (lambda: distill(grad_norm="l2"), "grad_norm must be 'dmd' or 'none', got 'l2'"),
        (lambda: distill(grad_clip=0.0), "grad_clip must be > 0"),
        (lambda: distill(guidance_scale=2.0), "guidance_scale=2.0 needs a teacher with a negative condition"),
        (lambda: distill(guidance_scale=-1.0), "guidance_scale must be >= 0"),
        (lambda: distill(student_times=[1.0]), "student_times must begin with the time of pure noise, 80.0"),
        (lambda: distill(student_times=[80.0, 0.0]), "student_times must end before the data"),
        (lambda: distill(student_times=[80.0, 81.0]), "times must be two or more falling"),
        (lambda: distill(divergence="rkl", gan_weight=0.0, discriminator=Linear()), "discriminator must be None"),
        (lambda: distill(seed=-1), "seed must be >= 0"),
        (same_network_twice, "student must not be the teacher itself"),
        (lambda: distill(fake_score=Denoiser(TimeMLP([DIM]))), "fake_score must have the process of the teacher, EDM"),
        (lambda: distill(student=mlp_denoiser(2)), "student must have a conditioning if, and only if"),
        (
            lambda: distill(student=Denoiser(TimeMLP([DIM + 1]), "edm", "edm", "edm")),
            r"student must make samples of the teacher's shape, \[3\], got \[4\]",
        ),
        (
            lambda: distill(teacher=Denoiser(TimeMLP([DIM]), "fm", "epsilon")),
            "student must predict x0, flow, v_prediction or edm",
        ),
        (lambda: distill(teacher=Denoiser(lambda x, t: x, "edm", "x0")), "student must have parameters to train"),
        (lambda: distill(teacher=Denoiser(nn.Linear(2, 2), "edm", "x0")), "discriminator must be given, as a network"),
        (lambda: DensityRatio(clip=(2.0, 1.0)), "clip must be two rising numbers > 0"),
        (lambda: DensityRatio(clip=(0.0, 1.0)), "clip must be two rising numbers > 0"),
        (lambda: DensityRatio(bins=0), "bins must be >= 1, got 0"),
        (lambda: DensityRatio(ema=1.0), r"ema must be in \[0, 1\), got 1.0"),
        (lambda: DensityRatio(spacing="sigma"), "spacing must be 'time', 'log_sigma' or 'quantile'"),
        (lambda: Critics(r1_weight=-1.0), "r1_weight must be >= 0, got -1.0"),
        (lambda: Critics(r1_noise=0.0), "r1_noise must be > 0, got 0.0"),
        (lambda: Critics(fake_weighting="snr5"), "weighting must be one of"),
        (lambda: Critics(discriminator_features="student"), "discriminator_features must be 'teacher' or 'fake_score'"),
        (lambda: distill().sample(0), "n must be >= 1, got 0"),
        (lambda: FeatureDiscriminator([]), "layers must name at least one layer"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_noise_is_added_in_float64() -> None:
    """At t = 80 a float32 sum would lose what is below 4e-6; rounding once loses less than summing rounded parts."""
    x0, eps, t = torch.tensor([[0.1]]), torch.tensor([[1.234567]]), torch.tensor([79.9])
    got = module_under_test._noised(distill().teacher.process, x0, eps, t)
    exact = x0.double() + t.double()[:, None] * eps.double()
    assert torch.equal(got, exact.float())
