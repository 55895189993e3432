"""The functions of f-distill against finite differences of the divergences, and on two ranks."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_methods.diffusion import RatioNormalizer, divergence_weight, normalize_weight, vsd_loss
from tests.distributed.launch import run_ranks

F: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": lambda r: -r.log(),
    "softened_rkl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "js": lambda r: r * r.log() - (r + 1) * (0.5 * (r + 1)).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: 1 / r - 1,
}
# Derivatives of D_f(N(0, 1) || N(m, s^2)) in m and s at m = 0.4, s = 0.8.
GRADIENTS = {
    "rkl": (0.4, -0.45),
    "kl": (0.625, -1.01563),
    "js": (0.22077, -0.27613),
    "squared_hellinger": (0.11755, -0.15518),
    "softened_rkl": (0.17923, -0.17387),
    "jeffreys": (1.025, -1.46563),
    "neyman": (0.70923, -0.631),
}
X = torch.linspace(-12, 12, 200_001, dtype=torch.float64)


def normal(m: float, s: float) -> Tensor:
    return (-0.5 * ((X - m) / s) ** 2).exp() / (s * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("name", F)
def test_weights_are_r_squared_times_the_second_derivative(name: str) -> None:
    r = torch.tensor([0.05, 0.5, 1.0, 3.0, 20.0], dtype=torch.float64)
    second = torch.func.vmap(torch.func.grad(torch.func.grad(F[name])))(r)
    torch.testing.assert_close(divergence_weight(r, name), r**2 * second)


@pytest.mark.parametrize("name", F)
def test_weighted_score_differences_are_the_gradient_of_the_divergence(name: str) -> None:
    m, s = 0.4, 0.8
    p, q = normal(0, 1), normal(m, s)
    difference = -X + (X - m) / s**2  # of the scores of p and q
    weight = divergence_weight(p / q, name)
    # x = m + s z moves by 1 with m and by z = (x - m) / s with s.
    by_theorem = [-torch.trapezoid(q * weight * difference * move, X) for move in (torch.ones_like(X), (X - m) / s)]
    assert [float(g) for g in by_theorem] == pytest.approx(GRADIENTS[name], abs=2e-5)

    def divergence(m: float, s: float) -> float:
        q = normal(m, s)
        inside = q > 1e-280
        return float(torch.trapezoid(torch.where(inside, q * F[name]((p / q).clamp(1e-300)), torch.zeros_like(q)), X))

    if name != "neyman":  # whose integral reaches beyond what floating point holds
        h = 1e-5
        assert (divergence(m + h, s) - divergence(m - h, s)) / (2 * h) == pytest.approx(GRADIENTS[name][0], abs=1e-4)
        assert (divergence(m, s + h) - divergence(m, s - h)) / (2 * h) == pytest.approx(GRADIENTS[name][1], abs=1e-4)


def test_a_function_is_a_divergence_and_unknown_names_are_listed() -> None:
    r = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = divergence_weight(r, lambda r: r**3)
    assert weight.tolist() == [1.0, 8.0]
    assert not weight.requires_grad
    with pytest.raises(ValueError, match=r"divergence must be one of.*'jeffreys'.*got 'chi2'"):
        divergence_weight(r, "chi2")


def test_the_mean_ratio_of_every_bin_is_one_and_empty_bins_stay() -> None:
    torch.manual_seed(0)
    normalizer = RatioNormalizer(0.0, 1.0, num_bins=4)
    t = 0.75 * torch.rand(1000)  # the last bin is empty
    r = normalizer(torch.randn(1000, 2), t)
    for low in (0.0, 0.25, 0.5):
        assert float(r[(t >= low) & (t < low + 0.25)].mean()) == pytest.approx(1, abs=1e-4)
    assert float(normalizer.means[3]) == 1
    assert "means" in normalizer.state_dict()


def test_ratios_are_averaged_over_heads_clipped_and_remembered() -> None:
    normalizer = RatioNormalizer(0.0, 1.0, num_bins=1, ema=0.5)
    r = normalizer(torch.tensor([[0.0, 2.0], [50.0, 50.0], [-50.0, -50.0]]), torch.full((3,), 0.5))
    raw = torch.tensor([math.e, 20.0, 0.1])
    mean = 0.5 + 0.5 * float(raw.mean())
    torch.testing.assert_close(r, raw / mean, rtol=1e-5, atol=0)
    assert float(normalizer.means) == pytest.approx(mean, rel=1e-5)


def test_bins_may_be_equal_in_the_logarithm() -> None:
    normalizer = RatioNormalizer(0.01, 100.0, num_bins=2, spacing="log_time")
    normalizer(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(normalizer.means, torch.tensor([math.e, 1 / math.e]), rtol=1e-5, atol=0)


def on_a_rank(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    logits, t = torch.linspace(-2, 2, 10), torch.linspace(0, 1, 10)
    mine = slice(0, 3) if rank == 0 else slice(3, 10)  # unequal shares
    normalizer = RatioNormalizer(0.0, 1.0, num_bins=2)
    r = normalizer(logits[mine], t[mine])
    return r, normalize_weight(divergence_weight(r, "kl")), normalizer.means


def test_two_ranks_are_one_process_on_both_shares() -> None:
    normalizer = RatioNormalizer(0.0, 1.0, num_bins=2)
    r = normalizer(torch.linspace(-2, 2, 10), torch.linspace(0, 1, 10))
    weight = normalize_weight(divergence_weight(r, "kl"))
    first, second = run_ranks(on_a_rank, 2)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), r)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), weight)
    assert float(weight.mean()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(first[2], second[2], rtol=0, atol=0)


def test_gradient_of_the_loss_is_the_weighted_difference() -> None:
    torch.manual_seed(0)
    x, real, fake = (torch.randn(3, 2, 4) for _ in range(3))
    x.requires_grad_()
    weight = torch.tensor([0.5, 1.0, 2.0])
    vsd_loss(x, real, fake, weight).backward()
    c = weight / ((x.detach() - real).abs().flatten(1).mean(1) + 1e-6)
    torch.testing.assert_close(x.grad, c[:, None, None] * (fake - real) / x.numel())
    x.grad = None
    vsd_loss(x, real, fake, grad_norm="none").backward()
    torch.testing.assert_close(x.grad, (fake - real) / x.numel())


def test_the_reverse_kl_is_dmd2_and_samples_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    x, real, fake = (torch.randn(3, 4) for _ in range(3))
    ones = divergence_weight(torch.rand(3) + 0.1, "rkl")
    assert torch.equal(vsd_loss(x, real, fake, ones), vsd_loss(x, real, fake))

    def gradient(factor: float) -> Tensor:
        y = (x * torch.tensor([[factor], [1.0], [1.0]])).requires_grad_()
        vsd_loss(y, real, fake).backward()
        assert y.grad is not None
        return y.grad

    assert torch.equal(gradient(100.0)[1:], gradient(1.0)[1:])
    assert not torch.equal(gradient(100.0)[0], gradient(1.0)[0])
    assert not vsd_loss(x, real, fake * math.inf).isfinite(), "what is not finite is seen, not hidden"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RatioNormalizer(1.0, 0.5), "t_min and t_max must be rising, and > 0 for log_time, got 1.0 and 0.5"),
        (lambda: RatioNormalizer(0.0, 1.0, spacing="log_time"), "t_min and t_max must be rising"),
        (lambda: RatioNormalizer(0.0, 1.0, 0), "num_bins must be >= 1, got 0"),
        (lambda: RatioNormalizer(0.0, 1.0, ema=1.0), r"ema must be in \[0, 1\), got 1.0"),
        (lambda: RatioNormalizer(0.0, 1.0, clip=(2.0, 1.0)), "clip must be two rising numbers > 0"),
        (lambda: RatioNormalizer(0.0, 1.0, spacing="sigma"), "spacing must be 'time' or 'log_time', got 'sigma'"),
        (lambda: vsd_loss(torch.ones(2), torch.ones(2), torch.ones(3)), "must have one shape"),
        (lambda: vsd_loss(*[torch.ones(2, 1)] * 3, grad_norm="l2"), "grad_norm must be 'dmd' or 'none', got 'l2'"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
