"""Paths and divergences against closed forms: exact control, linear SDEs, both readings of the noise."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from lit_methods.vi import (
    ControlMLP,
    DiagonalDiffusion,
    DriftMLP,
    FractionalSDE,
    HurstCurve,
    LinearDrift,
    MarkovFBM,
    SDEPath,
)


class Constant(nn.Module):
    """A control that is the same everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, y: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return torch.full_like(x, self.value)


class Told(nn.Module):
    """A control that is its context."""

    def forward(self, x: Tensor, y: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return context


class Half(nn.Module):
    """The diffusion ``x / 2``."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x


class Two(nn.Module):
    """The diffusion 2, as a module that looks as if it depended on ``x``."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 2.0 + 0 * x


class BestControl(nn.Module):
    """The control of the exact posterior: no drift, diffusion 1, one observation ``o`` at time ``end``."""

    def __init__(self, noise: MarkovFBM, o: float, end: float, std: float, y0: Tensor | None = None) -> None:
        super().__init__()
        self.w, self.g = noise.weights().detach(), noise.speeds
        self.o, self.end, self.std, self.y0 = o, end, std, y0

    def forward(self, x: Tensor, y: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        left = self.end - t.double()
        decay = torch.exp(-self.g * left)
        sums = self.g[:, None] + self.g
        variance = (self.w[:, None] * self.w * -torch.expm1(-sums * left) / sums).sum()
        mean = x + (y * (self.w * (decay - 1))).sum(-1)
        return (self.o - mean) / (variance + self.std**2) * (self.w * decay).sum()


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sde(noise: MarkovFBM, control: nn.Module | None = None, rate: float = 0.0, s: float | nn.Module = 1.0, **more):
    return FractionalSDE(LinearDrift(rate), s, control, noise, more.pop("state_dim", 1), **more)


def bound(path: SDEPath, o: float, std: float) -> tuple[float, float]:
    nats = -0.5 * ((o - path.x[:, -1, 0]) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi)) - path.path_kl
    return nats.mean().item(), (nats.std() / len(nats) ** 0.5).item()


def test_the_exact_control_gives_the_evidence() -> None:
    noise = MarkovFBM(time_horizon=6.0, hurst=0.7)
    end = torch.tensor(2.0)
    evidence = (
        torch.distributions.Normal(0, (noise.covariance(end, end) + 0.01).sqrt()).log_prob(torch.tensor(0.7)).item()
    )
    assert evidence == pytest.approx(-1.4305, abs=1e-4)
    times, x0 = torch.tensor([0.0, 2.0]), torch.zeros(2000, 1).double()
    for exact, steps, bias in ((False, 200, 0.09), (False, 800, 0.02), (True, 200, 0.09)):
        control = BestControl(noise, 0.7, 2.0, 0.1)
        found, error = bound(sde(noise, control, dt=2.0 / steps, exact_ou=exact)(x0, times, generator=draw()), 0.7, 0.1)
        assert evidence - bias - 4 * error < found < evidence + 4 * error
    # Any other control is worse, the more the farther away.
    none, error = bound(sde(noise, Constant(0.0), dt=0.01, exact_ou=True)(x0, times, generator=draw()), 0.7, 0.1)
    assert none + 4 * error < evidence


def test_kind_i_with_the_prior_of_its_start_stays_below_the_evidence() -> None:
    noise = MarkovFBM(time_horizon=6.0, kind="I", hurst=0.7)
    w, g, o, std = noise.weights(), noise.speeds, 0.7, 0.1
    sums = g[:, None] + g
    v0 = (w[:, None] * w * -torch.expm1(-sums * 2.0) / sums).sum()
    c = w * torch.expm1(-g * 2.0)
    q = c @ noise.initial_covariance() @ c
    limit = -0.5 * (o**2 + q) / (v0 + std**2) - 0.5 * torch.log(2 * math.pi * (v0 + std**2))
    end = torch.tensor(2.0)
    torch.testing.assert_close(noise.covariance(end, end), v0 + q)
    path = sde(noise, BestControl(noise, o, 2.0, std), dt=0.0025)(
        torch.zeros(4000, 1).double(), torch.tensor([0.0, 2.0]), generator=draw()
    )
    found, error = bound(path, o, std)
    assert found == pytest.approx(limit.item(), abs=4 * error + 0.02)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_a_linear_sde_has_the_variance_of_its_matrix_exponential(kind: str) -> None:
    noise, rate = MarkovFBM(hurst=0.3, kind=kind), 2.0
    w, g = noise.weights(), noise.speeds
    k = len(g)
    f = torch.zeros(k + 1, k + 1).double()
    f[0, 0], f[0, 1:] = -rate, -w * g
    f[1:, 1:] = -torch.diag(g)
    push = torch.cat([w.sum()[None], torch.ones(k).double()])
    block = torch.zeros(2 * k + 2, 2 * k + 2).double()  # Van Loan's
    block[: k + 1, : k + 1], block[: k + 1, k + 1 :], block[k + 1 :, k + 1 :] = -f, push[:, None] * push, f.T
    power = torch.matrix_exp(block)
    move = power[k + 1 :, k + 1 :].T
    start = torch.zeros(k + 1, k + 1).double()
    start[1:, 1:] = noise.initial_covariance()
    expected = (move @ power[: k + 1, k + 1 :] + move @ start @ move.T)[0, 0]
    for exact, tolerance in ((False, 0.06), (True, 0.06)):
        path = sde(noise, rate=rate, dt=0.004, exact_ou=exact).sample_prior(
            torch.zeros(8000, 1), torch.tensor([0.0, 1.0]), generator=draw()
        )
        assert path.x[:, -1].var().item() == pytest.approx(expected.item(), rel=tolerance)


def test_exact_steps_have_the_exact_covariance_in_few_steps() -> None:
    for kind in ("I", "II"):
        noise = MarkovFBM(hurst=0.3, kind=kind)
        times = torch.tensor([0.0, 0.1, 0.35, 1.0])
        x = sde(noise, exact_ou=True, dt=1.0).sample_prior(torch.zeros(20_000, 1).double(), times, generator=draw()).x
        expected = noise.covariance(times[1:, None], times[1:])
        error = (expected.diag()[:, None] * expected.diag() + expected**2).div(len(x)).sqrt()
        assert ((x[:, 1:, 0].T @ x[:, 1:, 0] / len(x) - expected).abs() < 4.5 * error).all()


@pytest.mark.parametrize("method", ["euler", "milstein"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["I", "II", "white"])
def test_a_constant_control_costs_what_it_must(method: str, exact: bool, kind: str) -> None:
    noise = MarkovFBM(time_horizon=2.0, kind=kind, gamma_max=10.0)
    times = torch.tensor([0.0, 0.7, 2.0])
    for dt in (0.03, 0.01):
        model = sde(noise, Constant(0.7), state_dim=3, dt=dt, method=method, exact_ou=exact)
        path = model(torch.randn(4, 3), times, generator=draw())
        torch.testing.assert_close(path.path_kl, torch.full((4,), 1.47), rtol=1e-5, atol=1e-5)
        assert path.x.shape == (4, 3, 3)
        assert path.y.shape == (4, 3, noise.num_ou)
    alone = model(torch.randn(4, 3), times[:1])
    assert not alone.path_kl.any()


@pytest.mark.parametrize("exact", [False, True])
def test_no_control_is_the_prior(exact: bool) -> None:
    noise = MarkovFBM(kind="I")
    model = FractionalSDE(
        DriftMLP(2, [8], periodic_time=True),
        DiagonalDiffusion(2, [8]),
        ControlMLP(2, 5, [8]),
        noise,
        2,
        dt=0.02,
        exact_ou=exact,
    )
    x0, times = torch.randn(3, 2), torch.tensor([0.0, 0.5, 1.0])
    posterior, prior = model(x0, times, generator=draw()), model.sample_prior(x0, times, generator=draw())
    assert torch.equal(posterior.x, prior.x)
    assert torch.equal(posterior.path_kl, torch.zeros(3))
    assert torch.equal(posterior.x[:, 0], x0)


def test_a_control_moves_the_mean_as_it_should() -> None:
    noise = MarkovFBM(hurst=0.6)
    times = torch.tensor([0.0, 1.0])
    for exact, tolerance in ((False, 2e-3), (True, 1e-8)):
        model = [sde(noise, Constant(u), dt=0.001, exact_ou=exact) for u in (0.0, 1.0)]
        plain, moved = (m(torch.zeros(1, 1).double(), times, generator=draw()).x[0, 1, 0] for m in model)
        expected = (noise.weights() * -torch.expm1(-noise.speeds) / noise.speeds).sum()
        torch.testing.assert_close(moved - plain, expected, rtol=tolerance, atol=tolerance)


def test_white_noise_is_an_ordinary_euler_path() -> None:
    model = sde(MarkovFBM(kind="white"), rate=0.5, s=Half(), dt=0.1, method="euler")
    path = model.sample_prior(torch.ones(2, 1), torch.tensor([0.0, 1.0]), generator=draw())
    dw = torch.randn(10, 2, 1, generator=draw()) * 0.1**0.5
    x = torch.ones(2, 1)
    for step in dw:
        x = x - 0.5 * x * 0.1 + 0.5 * x * step
    torch.testing.assert_close(path.x[:, -1], x)


def test_ito_and_stratonovich() -> None:
    times, x0 = torch.tensor([0.0, 1.0]), torch.ones(40_000, 1)
    for exact in (False, True):
        for method, mean in (("euler", 1.0), ("milstein", math.exp(0.125))):
            model = sde(MarkovFBM(kind="white"), s=Half(), dt=0.02, method=method, exact_ou=exact)
            x = model.sample_prior(x0, times, generator=draw()).x[:, -1]
            assert x.mean().item() == pytest.approx(mean, abs=0.012)
    assert sde(MarkovFBM(), s=Half()).method == "milstein"
    assert sde(MarkovFBM()).method == "euler"
    paths = [
        sde(MarkovFBM(), s=s, dt=0.02, method=method).sample_prior(x0[:3].double(), times, generator=draw()).x
        for method in ("euler", "milstein")
        for s in (2.0, Two())
    ]
    for path in paths[1:]:
        torch.testing.assert_close(path, paths[0], rtol=0, atol=1e-12)


def test_milstein_is_the_stratonovich_scheme() -> None:
    """One step of ``dX = X / 2 dB``: x (1 + z / 2 + z^2 / 8), z the increment of W."""
    model = sde(MarkovFBM(kind="white"), s=Half(), dt=0.1)
    x = model.sample_prior(torch.ones(5, 1), torch.tensor([0.0, 0.1]), generator=draw()).x[:, 1]
    z = torch.randn(1, 5, 1, generator=draw())[0] * 0.1**0.5
    torch.testing.assert_close(x, 1 + z / 2 + z**2 / 8)


def test_steps_are_counted_before_they_are_taken() -> None:
    model = sde(MarkovFBM(), dt=0.1 / 3)
    frames = 0.1 * torch.arange(25)
    for times in (frames, frames.double(), frames.double() + 4096):
        assert model.step_counts(times) == [3] * 24
    tiny = sde(MarkovFBM(), dt=1e-9 * 0.1 / 3)
    assert tiny.step_counts(1e-9 * frames) == tiny.step_counts(1e-9 * frames.double()) == [3] * 24
    assert sde(MarkovFBM(), substeps=2).step_counts(torch.tensor([0.0, 0.1, 0.35])) == [2, 5]
    assert sde(MarkovFBM(), dt=5.0).step_counts(torch.tensor([0.0, 0.1, 0.35])) == [1, 1]
    assert sde(MarkovFBM()).step_counts(torch.tensor([3.0])) == []


def test_noise_depends_on_step_and_row_and_generator_only() -> None:
    model = sde(MarkovFBM(kind="white"), dt=1e-4)
    late = 4096 + 1e-4 * torch.arange(2001).double()
    x = model.sample_prior(torch.zeros(4, 1).double(), late, generator=draw()).x[..., 0]
    steps = x.diff(dim=1)
    assert (torch.corrcoef(steps) - torch.eye(4)).abs().max() < 4 / 2000**0.5
    assert torch.corrcoef(torch.stack([steps[0, :-1], steps[0, 1:]]))[0, 1].abs() < 4 / 2000**0.5
    again = model.sample_prior(torch.zeros(4, 1).double(), late, generator=draw()).x[..., 0]
    assert torch.equal(again, x)
    early = model.sample_prior(torch.zeros(4, 1).double(), late - 4096, generator=draw()).x[..., 0]
    torch.testing.assert_close(early, x, rtol=1e-6, atol=1e-8)


def test_context_is_interpolated() -> None:
    times = torch.tensor([0.0, 1.0, 3.0])
    context = torch.tensor([0.0, 2.0, 6.0]).view(1, 3, 1)  # 2 t
    path = sde(MarkovFBM(kind="white"), Told(), s=0.0, dt=0.25)(torch.zeros(1, 1), times, context)
    u = 2 * torch.arange(0, 3, 0.25)
    torch.testing.assert_close(path.path_kl, (0.5 * u.square() * 0.25).sum()[None])
    same = sde(MarkovFBM(kind="white"), Told(), dt=0.25)(torch.zeros(1, 1), times, torch.full((1, 1), 2.0))
    torch.testing.assert_close(same.path_kl, torch.tensor([6.0]))


def test_recomputation_changes_nothing() -> None:
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        model = FractionalSDE(
            DriftMLP(2, [8]),
            DiagonalDiffusion(2, [8]),
            ControlMLP(2, 5, [8]),
            MarkovFBM(),
            2,
            dt=0.02,
            checkpoint_intervals=again,
        )
        nn.init.normal_(model.control.layers[-1].weight)
        path = model(torch.ones(3, 2), torch.tensor([0.0, 0.3, 1.0]), generator=draw())
        (path.x.square().sum() + path.path_kl.sum()).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().sum() > 0


def test_the_path_goes_on_from_its_memory() -> None:
    noise = MarkovFBM(time_horizon=1.0, kind="I", hurst=0.3)
    model = sde(noise, dt=0.01)
    whole = model.sample_prior(torch.zeros(2, 1).double(), torch.tensor([0.0, 0.5, 1.0]), generator=draw())
    generator = draw()
    first = model.sample_prior(torch.zeros(2, 1).double(), torch.tensor([0.0, 0.5]), generator=generator)
    steps = torch.randn(50, 2, 1, dtype=torch.float64, generator=draw(1))
    rest = model.sample_prior(first.x[:, -1], torch.tensor([0.5, 1.0]), first.y, generator=draw(1))
    y, x = first.y, first.x[:, -1]
    for step in steps * 0.1:
        later = y * (1 - noise.speeds * 0.01) + step[..., None]
        x = x + ((later - y) * noise.weights()).sum(-1)
        y = later
    torch.testing.assert_close(rest.x[:, -1], x)
    torch.testing.assert_close(rest.y, y)
    assert whole.x.shape == (2, 3, 1)


def test_an_index_that_changes_drives_the_path() -> None:
    curve = HurstCurve(2, start=0.3)
    varying = sde(MarkovFBM(hurst=curve), dt=0.01)
    fixed = sde(MarkovFBM(hurst=0.3), dt=0.01)
    args = (torch.zeros(2, 1).double(), torch.tensor([0.0, 0.5, 1.0]))
    path = varying.sample_prior(*args, generator=draw())
    torch.testing.assert_close(path.x, fixed.sample_prior(*args, generator=draw()).x)
    path.x[:, -1].square().sum().backward()
    assert (curve.logits.grad != 0).all()


def test_states_stay_wide_under_autocast() -> None:
    model = sde(MarkovFBM(), ControlMLP(1, 5, [8]), dt=0.02, exact_ou=True)
    with torch.autocast("cpu", torch.bfloat16):
        path = model(torch.zeros(2, 1), torch.tensor([0.0, 1.0]), generator=draw())
    assert {path.x.dtype, path.path_kl.dtype, path.y.dtype} == {torch.float32}
    plain = model(torch.zeros(2, 1), torch.tensor([0.0, 1.0]), generator=draw())
    torch.testing.assert_close(path.x, plain.x)


def test_the_index_has_a_gradient_through_the_path() -> None:
    noise = MarkovFBM()
    sde(noise, dt=0.02).sample_prior(
        torch.zeros(8, 1), torch.tensor([0.0, 1.0]), generator=draw()
    ).x.square().sum().backward()
    assert noise.logit.grad.abs() > 0


def test_what_is_suspicious_warns() -> None:
    with pytest.warns(UserWarning, match="dt asks for 20000 steps"):
        sde(MarkovFBM(kind="white"), dt=5e-5).sample_prior(torch.zeros(1, 1), torch.tensor([0.0, 1.0]))
    with pytest.warns(UserWarning, match="times span 2.*time_horizon of 1"):
        sde(MarkovFBM(), dt=0.02).sample_prior(torch.zeros(1, 1), torch.tensor([0.0, 2.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sde(MarkovFBM(), dt=0.02).sample_prior(torch.zeros(1, 1), torch.tensor([5.0, 6.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffusion": -1.0}, "diffusion must be >= 0 and finite, got -1.0"),
        ({"state_dim": 0}, "state_dim must be >= 1, got 0"),
        ({"dt": 0.0}, "dt must be > 0"),
        ({"substeps": 0}, "substeps must be >= 1, got 0"),
        ({"method": "heun"}, "method must be 'euler'.*got 'heun'"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    given = {"drift": LinearDrift(), "diffusion": 1.0, "control": None, "noise": MarkovFBM(), "state_dim": 1}
    with pytest.raises(ValueError, match=message):
        FractionalSDE(**given | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(2, 3)}, r"x0 must have shape \(batch, 1\), got \(2, 3\)"),
        ({"x0": torch.zeros(2, 1).bfloat16()}, "x0 must be float32 or float64"),
        ({"times": torch.tensor([0.0, 1.0, 1.0])}, "times must increase strictly, got 1 and then 1"),
        ({"times": torch.zeros(2, 3)}, r"times must have shape \(T,\).*mask \(batch, T\)"),
        ({"context": torch.zeros(2, 5, 1)}, r"context must have shape \(2, features\) or \(2, 2, features\)"),
        ({"y0": torch.zeros(2, 1, 4)}, r"y0 must have shape \(2, 1, 5\), got \(2, 1, 4\)"),
        (
            {"times": torch.tensor([0.0, 0.1])},
            "dt must be < 0.025 for the largest speed 20, got steps of 0.1.*exact_ou",
        ),
    ],
)
def test_bad_inputs_are_named(change: dict, message: str) -> None:
    model = sde(MarkovFBM(), ControlMLP(1, 5))
    with pytest.raises(ValueError, match=message):
        model(**{"x0": torch.zeros(2, 1), "times": torch.tensor([0.0, 0.02])} | change)
    with pytest.raises(ValueError, match="control must be given"):
        sde(MarkovFBM())(torch.zeros(2, 1), torch.tensor([0.0, 0.02]))
