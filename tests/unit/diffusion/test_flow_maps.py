import math
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lit_methods.callbacks import ConsistencySchedule
from lit_methods.diffusion import (
    CTM,
    SCM,
    Consistency,
    Denoiser,
    Diffusion,
    FlowMap,
    FlowMatching,
    Labels,
    MeanFlow,
    Objective,
    TimeMLP,
    TrigFlow,
    UniformTimes,
)
from lit_methods.diffusion.derivatives import along
from lit_methods.diffusion.objectives import Learner, LogVariance
from lit_methods.diffusion.processes import EDM
from tests.unit.diffusion.closed_forms import MEAN, POINTS, STD, gaussian_denoiser, gaussian_flow_map
from tests.unit.diffusion.test_diffusion import QUIET, points

T = torch.tensor([0.9, 0.6, 0.4], dtype=torch.float64)
S = torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64)


def rows(process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The exact flow map at a pair of times for each row, differentiable in all."""
    at, to = process.at(t), process.at(s)
    spread = [((p.alpha[:, None] * STD) ** 2 + p.sigma[:, None] ** 2).sqrt() for p in (at, to)]
    return to.alpha[:, None] * MEAN + spread[1] / spread[0] * (x - at.alpha[:, None] * MEAN)


def mean_velocity(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return (x - rows(FlowMatching(), x, t, s)) / (t - s)[:, None]


class ExactJump(nn.Module):
    """``F`` of the exact jump to the data of a consistency model, on arcs."""

    def __init__(self, sigma_data: float) -> None:
        super().__init__()
        self.process = TrigFlow(sigma_data)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x * self.process.sigma_data  # the network sees x over its standard deviation
        end = rows(self.process, x, t, torch.zeros_like(t))
        return -(t.cos()[:, None] * x - end) / (t.sin()[:, None] * self.process.sigma_data)


@pytest.mark.parametrize(("method", "tol"), [("forward", 1e-10), ("finite_difference", 1e-6)])
def test_mean_velocities_satisfy_the_identity_of_meanflow(method, tol: float) -> None:
    velocity = gaussian_denoiser("fm").flow(POINTS, T)
    tangents = (velocity, torch.ones_like(T), torch.zeros_like(S))
    mean, slope = along(mean_velocity, (POINTS, T, S), tangents, method)
    torch.testing.assert_close(velocity - (T - S)[:, None] * slope, mean, rtol=tol, atol=tol)


def test_exact_networks_jump_exactly() -> None:
    objective = MeanFlow()
    denoiser = Denoiser(lambda x, t, s: mean_velocity(x, t, s), "fm", "flow")
    there = objective.jump(denoiser, POINTS, 0.9, 0.2, None, torch.randn_like)
    torch.testing.assert_close(there, gaussian_flow_map(FlowMatching(), POINTS, 0.9, 0.2))


@pytest.mark.parametrize("warm", [0.5, 1.0])
def test_the_tangent_of_scm_vanishes_at_the_exact_jump(warm: float) -> None:
    denoiser = Denoiser(ExactJump(0.7), TrigFlow(0.7), "edm", "scale", sigma_data=0.7)
    torch.testing.assert_close(
        denoiser.x0(POINTS, T), rows(denoiser.process, POINTS, T, torch.zeros_like(T)), rtol=1e-9, atol=1e-9
    )
    velocity = gaussian_denoiser(TrigFlow(0.7)).flow(POINTS, T)
    learner = Learner(denoiser, None, "forward", 0, 0, LogVariance())
    _, tangent = SCM().tangent(learner, POINTS, T, velocity, None, warm)
    # Without its second part the tangent is not zero: it only leads there.
    assert (float(tangent.abs().max()) < 1e-9) == (warm == 1.0)


def test_ctm_composes_and_contains_the_denoiser() -> None:
    """For exact ``g`` the jump is the flow map, and as ``s`` nears ``t``, ``g`` nears the mean of the data."""

    def g(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        share = (s / t)[:, None]
        return (rows(EDM(), x, t, s) - share * x) / (1 - share)

    denoiser = Denoiser(g, EDM(), "x0")
    ctm = CTM()
    t, u, s = (torch.full((3,), v, dtype=torch.float64) for v in (3.0, 1.0, 0.4))
    twice = ctm.map(denoiser, ctm.map(denoiser, POINTS, t, u, None), u, s, None)
    torch.testing.assert_close(twice, ctm.map(denoiser, POINTS, t, s, None))
    near = g(POINTS, t, t * (1 - 1e-6))
    torch.testing.assert_close(near, gaussian_denoiser("edm").x0(POINTS, t), rtol=1e-4, atol=1e-4)


def test_consistency_begins_at_the_data_and_its_neighbours_close_in() -> None:
    denoiser = FlowMap(TimeMLP([2], width=8), "consistency").denoiser
    x = torch.randn(3, 2)
    torch.testing.assert_close(denoiser.x0(x, 0.0), x)
    torch.testing.assert_close(denoiser.x0(x, 0.002), x, rtol=0, atol=0.02)
    objective, t = Consistency(), torch.tensor([0.01, 1.0, 50.0])
    assert objective.nearer(t, 0).tolist() == [0, 0, 25]  # a gap of half of t, times up to 5 where t is small
    gaps = [t - objective.nearer(t, stage) for stage in range(4, 12)]
    assert all(bool((a >= b).all()) for a, b in pairwise(gaps))
    torch.testing.assert_close(gaps[0], t / 32 * (1 + 8 * torch.sigmoid(-t)))
    torch.testing.assert_close(t - objective.nearer(t, 30), t * 1e-3 * (1 + 8 * torch.sigmoid(-t)), rtol=1e-2, atol=0)


def test_distillation_from_an_exact_teacher_is_consistent() -> None:
    class Jump(nn.Module):
        """F of the exact jump to the data: what is left of it after c_skip x, over c_out."""

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            sigma, sd = (4 * t).exp(), 0.5
            x = x * (sigma**2 + sd**2).sqrt()[:, None]
            end = rows(EDM(), x, sigma, torch.zeros_like(sigma))
            skip, out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt()
            return (end - skip[:, None] * x) / out[:, None]

    exact = Denoiser(Jump(), EDM(), "edm", "edm")
    generator = torch.Generator().manual_seed(0)
    x0 = MEAN + STD * torch.randn(4000, 2, dtype=torch.float64, generator=generator)
    losses = {}
    for stage in (4, 6):
        for name, teacher in (("teacher", gaussian_denoiser("edm")), ("data", None)):
            learner = Learner(exact, teacher, "forward", 0, stage, None)
            losses[name, stage] = float(Consistency().losses(learner, x0, None, generator).mean())
    # One step of the teacher errs less than one pair of data and noise, and ever less per unit of time.
    assert losses["teacher", 6] < 0.5 * losses["teacher", 4]
    assert losses["teacher", 6] < 0.1 * losses["data", 6]


def test_meanflow_with_equal_times_is_flow_matching() -> None:
    torch.manual_seed(0)
    x0 = torch.randn(64, 2)
    model = FlowMap(TimeMLP([2], width=8, two_times=True), MeanFlow(different=0.0, power=0.0), seed=1)
    generator = torch.Generator().manual_seed(2)
    loss = model.loss(x0, generator=generator)
    generator = torch.Generator().manual_seed(2)
    process, sampler = FlowMatching(), MeanFlow().t
    t = torch.maximum(sampler.sample(64, process, generator, stratified=True), sampler.sample(64, process, generator))
    torch.rand(64, generator=generator)
    eps = torch.randn(64, 2, generator=generator)
    x = process.add_noise(x0, eps, t)
    plain = (model(x, t, None, t) - (eps - x0)).square().sum(1).mean()
    torch.testing.assert_close(loss, plain)


def test_guidance_becomes_part_of_meanflow() -> None:
    net = TimeMLP([2], width=8, num_classes=3, two_times=True)
    model = FlowMap(net, MeanFlow(guidance=(0.2, 0.92), guidance_until=0.5), conditioning=Labels(3))
    x, velocity, cond = torch.randn(2, 2), torch.randn(2, 2), torch.tensor([0, 1])
    t = torch.tensor([0.4, 0.8])
    told, null = (model(x, t, c, t).detach() for c in (cond, torch.tensor([3, 3])))
    got = model.objective._guided(model.denoiser, x, t, cond, velocity)
    torch.testing.assert_close(got[0], (0.2 * velocity + (1 - 0.2 - 0.92) * null + 0.92 * told)[0])
    assert torch.equal(got[1], velocity[1])
    with pytest.raises(ValueError, match=r"guidance=\(0.2, 0.92\) needs a conditioning"):
        model.objective._guided(model.denoiser, x, t, None, velocity)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        q, k, v = (self.qkv(x) + t[:, None, None]).chunk(3, -1)
        return self.dropout(nn.functional.scaled_dot_product_attention(q, k, v))


def test_forward_mode_and_finite_differences_agree_through_attention() -> None:
    torch.manual_seed(0)
    net = Attention().eval()
    x, t = torch.randn(2, 6, 4), torch.tensor([0.2, 0.7])
    tangents = (torch.randn(2, 6, 4), torch.ones(2))
    (value, exact), (same, close) = (along(net, (x, t), tangents, m) for m in ("forward", "finite_difference"))
    torch.testing.assert_close(value, same)
    torch.testing.assert_close(close, exact, rtol=1e-2, atol=1e-3)
    assert value.requires_grad
    assert not exact.requires_grad


def test_finite_differences_use_one_dropout_mask() -> None:
    torch.manual_seed(0)
    net = Attention()
    x, t = torch.randn(2, 6, 4, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    value, slope = along(net.double(), (x, t), (torch.zeros_like(x), torch.ones_like(t)), "finite_difference")
    # Values move by one with t, those that dropout zeroed do not; two masks would differ by 1 / step.
    assert float(slope.abs().max()) < 10
    assert torch.equal(slope == 0, value == 0)


def test_a_network_without_forward_derivative_is_named_with_the_way_out() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    with pytest.raises(RuntimeError, match=r'SDPBackend.MATH .* choose jvp="finite_difference"'):
        along(lambda x: Opaque.apply(x), (POINTS,), (POINTS,))


@pytest.mark.slow
@pytest.mark.parametrize("objective", [MeanFlow(UniformTimes()), Consistency(), SCM(warmup=300)])
def test_one_jump_makes_gaussian_data(objective: Objective) -> None:
    torch.manual_seed(0)
    net = TimeMLP([2], width=32, blocks=1, frequencies=8, two_times=objective.two_times)
    model = FlowMap(net, objective, sigma_data=0.7, seed=0)
    model.stage = 5
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=2000)
    generator = torch.Generator().manual_seed(0)
    for model.steps_drawn in range(2000):
        x0 = torch.tensor([1.0, -0.5]) + 0.5 * torch.randn(256, 2, generator=generator)
        optimizer.zero_grad()
        model.loss(x0, generator=generator).backward()
        optimizer.step()
        schedule.step()
    for steps in (1, 2):
        out = model.sample(2000, steps=steps, generator=torch.Generator().manual_seed(1), shape=[2])
        torch.testing.assert_close(out.mean(0), torch.tensor([1.0, -0.5]), rtol=0, atol=0.1)
        torch.testing.assert_close(out.std(0), torch.tensor([0.5, 0.5]), rtol=0.25, atol=0)


def test_teachers_are_rescaled_frozen_and_not_saved() -> None:
    teacher = Diffusion(TimeMLP([2], width=8)).denoiser
    model = FlowMap(TimeMLP([2], width=8), "scm", teacher=teacher)
    assert model.teacher is not None
    assert model.teacher.process == model.denoiser.process
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not [name for name in model.state_dict() if "teacher" in name]
    model.double()
    assert next(teacher.parameters()).dtype == torch.float64
    before = [p.clone() for p in teacher.parameters()]
    loss = model.loss(torch.randn(8, 2, dtype=torch.float64))
    loss.backward()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, teacher.parameters(), strict=True))


def test_the_schedule_moves_the_stage() -> None:
    model = FlowMap(TimeMLP([2], width=8), "consistency")
    Trainer(max_epochs=3, limit_val_batches=0, callbacks=[ConsistencySchedule(5)], **QUIET).fit(model, points())
    assert model.stage == 2  # twelve steps
    with pytest.raises(ValueError, match="ConsistencySchedule needs a FlowMap, got Diffusion"):
        Trainer(callbacks=[ConsistencySchedule(5)], max_steps=1, **QUIET).fit(Diffusion(TimeMLP([2])), points())


def test_learned_variance_starts_at_zero() -> None:
    assert LogVariance()(torch.tensor([0.1, 1.5])).tolist() == [0, 0]
    assert math.isclose(TrigFlow(0.5).prior_std, 0.5)


def test_ctm_without_a_teacher_warns() -> None:
    with pytest.warns(UserWarning, match="'ctm' without a teacher found the mean"):
        FlowMap(nn.Identity(), objective="ctm")
