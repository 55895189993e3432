"""The network against its equations written out, and against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from lit_methods.vi import PVRNN
from lit_methods.vi.pv_rnn import PVRNNOutput, SoftmaxCode
from lit_methods.vi.pv_rnn.network import gaussian_kl
from tests.unit.vi.pv_rnn.naive import naive_posterior


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def network(**arguments: object) -> PVRNN:
    settings: dict = {"hidden_sizes": [5, 4, 3], "latent_sizes": [2, 1, 1], "time_constants": [2.0, 3.0, 8.0]}
    return PVRNN(3, **settings | arguments).double()


def inputs(net: PVRNN, steps: int = 6, batch: int = 4) -> tuple[Tensor, Tensor]:
    adaptive = torch.randn(batch, steps, net.adaptive_size, dtype=torch.float64, requires_grad=True)
    return adaptive, torch.randn(steps, batch, net.adaptive_size // 2, dtype=torch.float64)


@pytest.mark.parametrize("from_state", [False, True])
@pytest.mark.parametrize("options", [{}, {"bottom_up": False}, {"posterior_uses_state": False}, {"output": "linear"}])
def test_fused_loop_and_its_gradients_equal_the_equations(options: dict, from_state: bool) -> None:
    net = network(**options)
    adaptive, eps = inputs(net)
    state = torch.randn(4, 12, dtype=torch.float64, requires_grad=True) if from_state else None
    out, naive = net.posterior(adaptive, state, eps=eps), naive_posterior(net, adaptive, eps, state)
    ours = (out.mean, out.kl, out.states)
    for mine, theirs in zip(ours, naive, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    factors = [torch.randn_like(x) for x in ours]
    wanted = [adaptive, *net.parameters(), *([] if state is None else [state])]
    mine, theirs = (
        torch.autograd.grad(sum((x * f).sum() for x, f in zip(xs, factors, strict=True)), wanted)
        for xs in (ours, naive)
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bounds", [None, (-0.1, 0.1)])
def test_gradients_equal_finite_differences(bounds: tuple[float, float] | None) -> None:
    net = network(log_sigma_bounds=bounds, hidden_sizes=[3, 2], latent_sizes=[1, 1], time_constants=[2.0, 4.0])
    adaptive, eps = inputs(net, steps=3, batch=2)

    def run(a: Tensor) -> tuple[Tensor, ...]:
        out = net.posterior(a, eps=eps)
        return out.mean, out.kl, out.prior_scale

    assert torch.autograd.gradcheck(run, (adaptive,))
    if bounds is not None:
        scales = net.posterior(adaptive, eps=eps).prior_scale[:, 1:].log()
        assert bounds[0] - 1e-12 <= scales.min() <= scales.max() <= bounds[1] + 1e-12


def test_kl() -> None:
    numbers = torch.tensor([0.3, math.log(0.5), -0.1, math.log(0.9)], dtype=torch.float64)
    assert gaussian_kl(*numbers).item() == pytest.approx(0.3409, abs=5e-5)
    assert gaussian_kl(*numbers[:2], *numbers[:2]).item() == 0
    assert gaussian_kl(*torch.tensor([1.0, -7.0, 0.0, -7.0], dtype=torch.float64)) == pytest.approx(
        601302.1421, abs=1e-3
    )
    assert gaussian_kl(*torch.tensor([0.0, -7.0, 0.0, 7.0], dtype=torch.float64)) == pytest.approx(13.5, abs=1e-6)


def test_time_constants_from_no_memory_to_nothing_but_memory() -> None:
    forgetful = network(hidden_sizes=[4], latent_sizes=[1], time_constants=[1.0])
    adaptive, eps = inputs(forgetful, steps=1)
    first, other = (torch.full((4, 4), x, dtype=torch.float64).requires_grad_() for x in (0.3, 0.3))
    step = forgetful.posterior(adaptive, first, eps=eps).states[:, 0]
    gates = first.tanh() @ forgetful.weight[:4].T + forgetful.bias[:4]
    heads = first.tanh() @ forgetful.weight[4:6].T + forgetful.bias[4:6]
    z = (heads[:, 1:2] + adaptive[:, 0, :1]).tanh() + (heads[:, 0:1] + adaptive[:, 0, 1:]).exp() * eps[0]
    torch.testing.assert_close(step, gates + z @ forgetful.latent.T)
    frozen = network(hidden_sizes=[4], latent_sizes=[1], time_constants=[1e12])
    torch.testing.assert_close(frozen.posterior(adaptive, other, eps=eps).states[:, 0], other)


def test_posterior_equals_prior_where_their_heads_do() -> None:
    net = network()
    with torch.no_grad():
        width, units = 12, 4
        ls_q, mu_q, mu_p, ls_p = (slice(width + i * units, width + (i + 1) * units) for i in range(4))
        net.weight[mu_q], net.weight[ls_q] = net.weight[mu_p], net.weight[ls_p]
        net.bias[mu_q], net.bias[ls_q] = net.bias[mu_p], net.bias[ls_p]
    adaptive, eps = inputs(net)
    state = torch.randn(4, 12, dtype=torch.float64)
    out = net.posterior(torch.zeros_like(adaptive), state, eps=eps)
    assert out.kl.abs().max() < 1e-14
    torch.testing.assert_close(out.mean, net.generate(6, 4, state, eps=eps).mean)
    torch.testing.assert_close(out.prior_scale, net.generate(6, 4, state, eps=eps).prior_scale)


@pytest.mark.parametrize("from_state", [False, True])
def test_adaptive_vectors_that_follow_the_prior(from_state: bool) -> None:
    net = network()
    _, eps = inputs(net)
    state = torch.randn(4, 12, dtype=torch.float64) if from_state else None
    adaptive = net.adaptive_like_prior(6, 4, state, eps=eps)
    out = net.posterior(adaptive, state, eps=eps)
    assert out.kl.abs().max() < 1e-12
    torch.testing.assert_close(out.mean, net.generate(6, 4, state, eps=eps).mean)


def test_a_run_in_two_parts_is_the_run() -> None:
    net = network()
    adaptive, eps = inputs(net, steps=10)
    whole = net.posterior(adaptive, eps=eps)
    assert isinstance(whole, PVRNNOutput)
    head = net.posterior(adaptive[:, :6], eps=eps[:6])
    tail = net.posterior(adaptive[:, 6:], head.states[:, -1], first=False, eps=eps[6:])
    for name in ("mean", "kl", "prior_scale", "states"):
        joined = torch.cat([getattr(head, name), getattr(tail, name)], 1)
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_unit_prior_at_the_first_step_only() -> None:
    net = network()
    adaptive, eps = inputs(net)
    assert (net.posterior(adaptive, eps=eps).prior_scale[:, 0] == 1).all()
    later = net.posterior(adaptive, torch.zeros(4, 12, dtype=torch.float64), eps=eps)
    torch.testing.assert_close(later.prior_scale[:, 0], net.bias[-4:].exp().expand(4, 4))


def test_target_regeneration_is_driven_by_the_posterior_first() -> None:
    net = network()
    adaptive, eps = inputs(net, steps=8)
    run = net.generate(8, 4, initial_adaptive=adaptive[:, :3], eps=eps)
    head = net.posterior(adaptive[:, :3], eps=eps[:3])
    torch.testing.assert_close(run.mean[:, :3], head.mean)
    torch.testing.assert_close(run.mean[:, 3:], net.generate(5, 4, head.states[:, -1], eps=eps[3:]).mean)
    assert run.mean.shape == (4, 8, 3)
    torch.testing.assert_close(net.generate(3, 4, initial_adaptive=adaptive[:, :3], eps=eps[:3]).mean, head.mean)


def test_prior_moments_of_small_weights_are_those_of_a_kalman_filter() -> None:
    """Where weights are tiny, tanh is the identity and the network a linear-Gaussian system."""
    net = PVRNN(1, [1], [1], [3.0], output="linear").double()
    with torch.no_grad():
        net.weight.zero_()
        net.bias.zero_()
        net.weight[0, 0] = 0.7
        net.bias[4] = math.log(2.0)  # log sigma_p
        net.latent.fill_(1e-4)
    draws = net.generate(12, 200_000, generator=torch.Generator().manual_seed(1)).states[..., 0]
    variance, expected = 0.0, []
    for t in range(12):
        noise = 1.0 if t == 0 else 4.0
        variance = (2 / 3 + 0.7 / 3) ** 2 * variance + noise * (1e-4 / 3) ** 2
        expected.append(variance)
    torch.testing.assert_close(draws.var(0), torch.tensor(expected, dtype=torch.float64), rtol=0.02, atol=0)
    assert draws.mean(0).abs().max() < 5 * math.sqrt(expected[-1] / 200_000)


def test_without_noise_nothing_depends_on_the_batch() -> None:
    net = network()
    adaptive, _ = inputs(net)
    whole = net.posterior(adaptive, deterministic=True).mean
    torch.testing.assert_close(net.posterior(adaptive[:1], deterministic=True).mean, whole[:1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net(adaptive, deterministic=True), whole)
    assert torch.equal(net.posterior(adaptive, deterministic=True).mean, whole)  # and no state is left in the network


def test_softmax_output() -> None:
    code = SoftmaxCode(-1.0, 1.0, units=10, width=0.05)
    net = network(output=code)
    adaptive, eps = inputs(net)
    out = net.posterior(adaptive, eps=eps)
    assert out.logits is not None
    assert out.logits.shape == (4, 6, 3, 10)
    assert -1 <= out.mean.min() <= out.mean.max() <= 1
    values = torch.linspace(-0.7, 0.7, 15, dtype=torch.float64)[:, None]
    coded = code.encode(values)
    torch.testing.assert_close(coded.sum(-1), torch.ones(15, 1, dtype=torch.float64))
    torch.testing.assert_close(code.decode(coded), values, rtol=0, atol=0.01)
    references = torch.linspace(-1, 1, 10, dtype=torch.float64)
    weights = (-(references - 0.3).square() / 0.05).exp()
    torch.testing.assert_close(code.encode(torch.tensor([[0.3]], dtype=torch.float64))[0, 0], weights / weights.sum())


def test_softmax_code_refuses_values_by_dimension() -> None:
    code = SoftmaxCode([0.0, -30.0], [1.0, 120.0])
    code.encode(torch.tensor([[0.5, 100.0]]))
    with pytest.raises(ValueError, match=r"in \[-30, 120\] in dimension 1, got 130"):
        code.encode(torch.tensor([[[0.5, 100.0], [0.5, 130.0]]]))
    with pytest.raises(ValueError, match="low must be one number or 3, got 2"):
        PVRNN(3, output=code)
    for arguments in ({"low": 1.0, "high": 0.0}, {"low": 0.0, "high": math.inf}):
        with pytest.raises(ValueError, match="low must be below high"):
            SoftmaxCode(**arguments)
    with pytest.raises(ValueError, match="units must be >= 2"):
        SoftmaxCode(0.0, 1.0, units=1)
    with pytest.raises(ValueError, match="width must be > 0"):
        SoftmaxCode(0.0, 1.0, width=0.0)


def test_computes_in_float32_under_autocast_and_in_bfloat16() -> None:
    net = PVRNN(2, [6], [2], [2.0])
    adaptive, eps = torch.randn(3, 5, 4), torch.randn(5, 3, 2)
    plain = net.posterior(adaptive, eps=eps).mean
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.posterior(adaptive, eps=eps).mean, plain)
    half = net.bfloat16().posterior(adaptive.bfloat16(), eps=eps)
    assert half.mean.dtype == half.kl.dtype == torch.float32
    assert half.mean.isfinite().all()


def test_constructing_and_running_with_a_generator_leaves_the_global_stream_alone() -> None:
    net = network()
    before = torch.get_rng_state()
    net.generate(3, 2, generator=torch.Generator().manual_seed(1))
    net.adaptive_like_prior(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_size": 0}, "output_size must be >= 1, got 0"),
        ({"hidden_sizes": [5, 4]}, "must be of one length >= 1, got 2, 3 and 3"),
        ({"hidden_sizes": [5, 4, 0]}, "hidden_sizes must hold numbers >= 1"),
        ({"latent_sizes": [5, 4, 0]}, "latent_sizes must hold numbers >= 1"),
        ({"time_constants": [1.0, 0.5, 2.0]}, "time_constants must hold finite numbers >= 1"),
        ({"output": "sigmoid"}, "output must be 'tanh', 'linear' or a SoftmaxCode, got 'sigmoid'"),
        ({"log_sigma_bounds": (1.0, -1.0)}, "log_sigma_bounds must be two rising"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    good = {"output_size": 2, "hidden_sizes": [3] * 3, "latent_sizes": [1] * 3, "time_constants": [2.0] * 3}
    with pytest.raises(ValueError, match=message):
        PVRNN(**good | arguments)


def test_wrong_shapes() -> None:
    net = network()
    adaptive, eps = inputs(net)
    with pytest.raises(ValueError, match=r"adaptive must be \(batch, steps, 8\), got \(4, 6, 7\)"):
        net.posterior(adaptive[..., :7])
    with pytest.raises(ValueError, match=r"state must be \(4, 12\), got \(4, 11\)"):
        net.posterior(adaptive, torch.zeros(4, 11))
    with pytest.raises(ValueError, match=r"eps must be \(6, 4, 4\), got \(5, 4, 4\)"):
        net.posterior(adaptive, eps=eps[:5])
    with pytest.raises(ValueError, match="steps and batch must be >= 1"):
        net.generate(0)
    with pytest.raises(ValueError, match=r"initial_adaptive must be \(4, at most 3, 8\)"):
        net.generate(3, 4, initial_adaptive=adaptive)
