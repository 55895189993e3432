import pytest
import torch
from torch import Tensor, nn

from lit_methods.diffusion import (
    Autoguidance,
    ClassifierFree,
    ClassifierGuidance,
    Conditioning,
    Denoiser,
    FlowMatching,
    Guidance,
    Labels,
    LossGuidance,
    Sampling,
    TimeMLP,
    Vectors,
    sample,
)
from lit_methods.diffusion.solvers import SOLVERS
from tests.unit.diffusion.closed_forms import POINTS, gaussian_denoiser


class Counting(nn.Module):
    """Pushes samples of class ``c`` towards ``c``, the null class (3) towards 10; notes how many rows it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        target = torch.where(cond == 3, 10, cond).to(x.dtype) if cond is not None else torch.zeros(len(x))
        return target[:, None].expand_as(x)


def labelled(dropout: float = 0.1) -> Denoiser:
    return Denoiser(Counting(), prediction="x0", conditioning=Labels(3, dropout))


COND = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("scale", "expected", "rows"), [(1, [0, 1, 2], 3), (0, [10, 10, 10], 6), (3, [-20, -17, -14], 6)]
)
def test_classifier_free_guidance(scale: float, expected: list[float], rows: int) -> None:
    denoiser = labelled()
    out = sample(denoiser, [3, 2], cond=COND, guidance=scale, steps=4)
    assert out[:, 0].tolist() == pytest.approx(expected)
    assert denoiser.net.rows == [rows] * 4


def test_guidance_within_an_interval_only() -> None:
    denoiser = labelled()
    sample(denoiser, [3, 2], cond=COND, guidance=ClassifierFree(2.0, interval=(0.4, 0.6)), steps=4)
    assert denoiser.net.rows == [3, 3, 6, 3]


def test_rescaled_guidance_has_the_spread_of_the_told_prediction() -> None:
    generator = torch.Generator().manual_seed(0)
    null, told = torch.randn(2, 1, 50, dtype=torch.float64, generator=generator).unbind()
    denoiser = Denoiser(lambda x, t, c: torch.cat([null, told]), prediction="x0", conditioning=Labels(2))
    guided = ClassifierFree(4.0, rescale=1.0)(denoiser, torch.zeros(1, 50).double(), 0.5, torch.tensor([1]))
    torch.testing.assert_close(guided.std(), told.std())
    raw = ClassifierFree(4.0)(denoiser, torch.zeros(1, 50).double(), 0.5, torch.tensor([1]))
    torch.testing.assert_close(raw, null + 4 * (told - null))
    assert float(raw.std()) > 1.5 * float(told.std())


def test_autoguidance_moves_away_from_the_weak_model() -> None:
    strong, weak = (Denoiser(lambda x, t, v=v: torch.full_like(x, v), prediction="x0") for v in (2.0, 1.0))
    assert sample(strong, [1, 2], guidance=Autoguidance(weak, 3.0)).tolist() == [[4.0, 4.0]]
    with pytest.raises(ValueError, match="weak must have the process and prediction"):
        sample(strong, [1, 2], guidance=Autoguidance(Denoiser(lambda x, t: x, "edm", "x0")))


@pytest.mark.parametrize("kind", ["x0", "epsilon", "flow", "v_prediction", "edm", "score"])
def test_classifier_guidance_adds_the_gradient_to_the_score(kind: str) -> None:
    def log_prob(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return -0.5 * (x - cond[:, None]).square().sum(1)

    plain = gaussian_denoiser("vp_linear")
    denoiser = Denoiser(lambda x, t: plain.predict(x, t, None, kind), "vp_linear", kind)
    guided = ClassifierGuidance(log_prob, 0.3)(denoiser, POINTS, 0.4, COND)
    steered = Denoiser(lambda x, t: guided, "vp_linear", kind).score(POINTS, 0.4)
    torch.testing.assert_close(steered, plain.score(POINTS, 0.4) + 0.3 * (COND[:, None] - POINTS))


def test_loss_guidance_of_a_linear_observation_moves_the_posterior() -> None:
    """One coordinate of correlated Gaussian data is observed; the other coordinate follows it."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)

    def net(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = float(1 - t[0]), float(t[0])
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2).double())
        return x @ gain.T

    observed = LossGuidance(lambda x0: (x0[:, 0] - 1.5).square(), scale=1.0)
    with torch.inference_mode():
        out = sample(
            Denoiser(net, prediction="x0"),
            [500, 2],
            guidance=observed,
            steps=100,
            generator=torch.Generator().manual_seed(0),
            dtype=torch.float64,
        )
    assert float(out[:, 0].mean()) == pytest.approx(1.5, abs=0.2)
    assert float(out[:, 1].mean()) > 1.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_depends_on_its_own_generator_only(solver: str) -> None:
    denoiser = gaussian_denoiser("fm")

    def seeds(*values: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(value) for value in values]

    together = sample(denoiser, [3, 2], generator=seeds(5, 6, 7), solver=solver, steps=6)
    alone = sample(denoiser, [1, 2], generator=seeds(6), solver=solver, steps=6)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)
    again = sample(denoiser, [2, 2], generator=seeds(5, 6), solver=solver, steps=6)
    torch.testing.assert_close(together[:2], again, rtol=1e-5, atol=1e-5)


def test_preconditioned_networks_see_unit_variance_and_a_bounded_noise_level() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return torch.zeros_like(x)

    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(net, "edm", "edm", "edm", sigma_data=0.7)
    x0 = 0.7 * torch.randn(20_000, 1, generator=generator)
    for sigma in (0.01, 1.0, 50.0):
        denoiser(x0 + sigma * torch.randn(20_000, 1, generator=generator), sigma)
        assert float(seen[-1][0].std()) == pytest.approx(1, abs=0.02)
        assert float(seen[-1][1][0]) == pytest.approx(0.25 * torch.tensor(sigma).log().item(), abs=1e-6)
    # F = 0 is the best linear guess.
    x = torch.ones(1, 1)
    assert float(denoiser.x0(x, 2.0)) == pytest.approx(0.49 / (4 + 0.49))


def test_features_stop_early() -> None:
    net = TimeMLP([2], width=8, blocks=2)
    net.out.register_forward_hook(lambda *_: pytest.fail("the rest of the network ran"))
    inner, first = Denoiser(net).features(torch.ones(3, 2), 0.5, ["inner", "blocks.0"])
    assert inner.shape == first.shape == (3, 8)
    with pytest.raises(ValueError, match="layers must name at least one layer"):
        Denoiser(net).features(torch.ones(3, 2), 0.5, [])
    with pytest.raises(AttributeError):
        Denoiser(net).features(torch.ones(3, 2), 0.5, ["blocks.7"])


def test_vectors_have_a_learned_null_value() -> None:
    told = Vectors(2, dropout=0.5)
    nn.init.constant_(told.null_vector, 7.0)
    dropped = told.drop(torch.zeros(1000, 2), torch.Generator().manual_seed(0))
    assert 0.4 < float((dropped[:, 0] == 7).float().mean()) < 0.6
    dropped.sum().backward()
    assert float(told.null_vector.grad.sum()) > 0
    denoiser = Denoiser(TimeMLP([2], width=8, cond_features=2), conditioning=told)
    assert sample(denoiser, [3, 2], cond=torch.zeros(3, 2), guidance=2.0, steps=2).shape == (3, 2)


def test_time_mlp_tells_times_and_conditions_apart() -> None:
    net = TimeMLP([1, 4, 4], width=16, num_classes=3, two_times=True)
    x = torch.ones(2, 1, 4, 4)
    base = net(x, torch.tensor([0.2, 0.2]), torch.tensor([0, 0]), torch.tensor([0.1, 0.1]))
    assert base.shape == x.shape
    for changed in (
        net(x, torch.tensor([0.2, 0.3]), torch.tensor([0, 0]), torch.tensor([0.1, 0.2])),
        net(x, torch.tensor([0.2, 0.2]), torch.tensor([0, 1]), torch.tensor([0.1, 0.1])),
        net(x, torch.tensor([0.2, 0.2]), torch.tensor([0, 0]), torch.tensor([0.1, 0.0])),
    ):
        assert torch.equal(changed[0], base[0])
        assert not torch.equal(changed[1], base[1])


def test_networks_of_lower_precision_get_their_own_dtype_and_the_state_keeps_its() -> None:
    denoiser = Denoiser(TimeMLP([2], width=8).bfloat16())
    out = sample(denoiser, [3, 2], steps=3, dtype=torch.float32)
    assert out.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sample(labelled(), [3, 2], steps=0), "steps must be >= 1, got 0"),
        (lambda: sample(labelled()), "shape must be given"),
        (lambda: sample(labelled(), [2, 2], x_init=torch.ones(3, 2)), r"shape must be that of x_init, \(3, 2\)"),
        (lambda: sample(labelled(), [3, 2], guidance=2.0), "guidance with scale=2.0 needs cond"),
        (lambda: sample(labelled(0.0), [3, 2], cond=COND, guidance=2.0), "dropout is > 0"),
        (lambda: sample(labelled(), [3, 2], cond=COND + 2), "cond must be labels below num_classes=3 .* got 2 to 4"),
        (lambda: sample(labelled(), [3, 2], cond=COND.float()), "cond must be int64 labels"),
        (lambda: sample(labelled(), [4, 2], cond=COND), "cond must hold one condition for each of 4 samples, got 3"),
        (
            lambda: sample(Denoiser(lambda x, t: x, prediction="epsilon"), [3, 2]),
            "prediction 'epsilon' cannot start at t=1 of FlowMatching",
        ),
        (lambda: sample(gaussian_denoiser("fm"), [2, 2], guidance=ClassifierGuidance(lambda x, t, c: x)), "needs cond"),
        (lambda: Denoiser(lambda x, t: x[:, :1])(torch.ones(3, 2), 0.5), "a prediction must have the shape of x"),
        (lambda: Denoiser(lambda x, t: x, prediction="noise"), "prediction must be one of"),
        (lambda: Denoiser(lambda x, t: x, precondition="ve"), "precondition must be one of"),
        (lambda: Denoiser(lambda x, t: x, sigma_data=0.0), "sigma_data must be > 0"),
        (lambda: Denoiser(lambda x, t: x, clip_x0=(1.0, -1.0)), "clip_x0 must be"),
        (lambda: ClassifierFree(-1.0), "scale must be >= 0"),
        (lambda: ClassifierFree(interval=(0.5, 0.1)), "interval must be"),
        (lambda: ClassifierFree(rescale=2.0), "rescale must be"),
        (lambda: Autoguidance(labelled(), -1.0), "scale must be"),
        (lambda: LossGuidance(lambda x: x, -1.0), "scale must be"),
        (lambda: ClassifierGuidance(lambda x, t, c: x, -1.0), "scale must be"),
        (lambda: Labels(0), "num_classes must be"),
        (lambda: Labels(3, dropout=1.0), "dropout must be"),
        (lambda: Vectors(0), "features must be"),
        (lambda: Vectors(3).check(torch.ones(2, 4)), r"cond must be floating-point vectors \(batch, 3\)"),
        (lambda: Sampling(steps=0), "steps must be"),
        (lambda: Sampling(solver="dpm"), "solver must be one of"),
        (lambda: TimeMLP([]), "shape must hold"),
        (lambda: TimeMLP([2], width=0), "width, blocks and frequencies must be"),
        (lambda: TimeMLP([2], num_classes=2, cond_features=2), "num_classes must be None"),
        (lambda: TimeMLP([2])(torch.ones(1, 2), torch.ones(1), torch.ones(1)), "cond must be None"),
    ],
)
def test_bad_arguments(build, message: str) -> None:
    assert issubclass(ClassifierFree, Guidance)
    assert issubclass(Labels, Conditioning)
    assert FlowMatching().t_max == 1
    with pytest.raises(ValueError, match=message):
        build()
