"""Error regression: what it may change and what not, streams, windows, and sines that it has not seen."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from lit_methods.vi import PVRNN, ErrorRegression
from lit_methods.vi.pv_rnn import WindowLoss
from lit_methods.vi.pv_rnn.objective import as_meta_prior, step_losses


@pytest.fixture
def network() -> PVRNN:
    torch.manual_seed(0)
    return PVRNN(2, [6, 4], [2, 1], [2.0, 4.0]).double()


@pytest.fixture
def values() -> Tensor:
    return 0.5 * torch.sin(torch.arange(72, dtype=torch.float64)).view(3, 12, 2)


def follow(regression: ErrorRegression, values: Tensor) -> list[WindowLoss]:
    return [regression.update(x) for x in values.unbind(1)]


def test_weights_flags_gradients_and_the_global_stream_stay(network: PVRNN, values: Tensor) -> None:
    network.readout.requires_grad_(False)
    network.bias.grad = torch.ones_like(network.bias)
    network.readout.eval()
    before = [p.clone() for p in network.parameters()]
    stream = torch.get_rng_state()
    follow(ErrorRegression(network, window=4, iterations=5), values)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
    assert [n for n, p in network.named_parameters() if not p.requires_grad] == ["readout.weight", "readout.bias"]
    assert network.training
    assert not network.readout.training
    assert (network.bias.grad == 1).all()
    assert network.weight.grad is None
    assert torch.equal(torch.get_rng_state(), stream)


def test_losses_are_those_of_the_training_objective_and_fall(network: PVRNN, values: Tensor) -> None:
    regression = ErrorRegression(network, window=12, iterations=60, meta_prior=0.1, initial_meta_prior=0.2)
    loss = regression.begin(values)
    assert (loss.after < loss.before).all()
    assert regression.recent is not None
    out = network.posterior(regression.recent.adaptive, deterministic=True)
    mask = torch.ones(3, 12, dtype=torch.bool)
    parts = step_losses(network, out, values, mask, as_meta_prior(0.1, 0.2, 2), first=True)
    torch.testing.assert_close(loss.after, parts.total())
    scale = torch.full((12, 2), 0.1, dtype=torch.float64)
    scale[0] = 0.2
    by_hand = 0.25 * (out.mean - values).square().sum((1, 2)) + (out.kl * scale / torch.tensor([2, 1])).sum((1, 2))
    torch.testing.assert_close(loss.after, by_hand)


def test_streams_are_independent(network: PVRNN, values: Tensor) -> None:
    together, alone = ErrorRegression(network, 4, 6, seed=3), ErrorRegression(network, 4, 6, seed=3)
    both, one = follow(together, values), follow(alone, values[:1])
    for pair, single in zip(both, one, strict=True):
        torch.testing.assert_close(pair.after[:1], single.after, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.predict(5, 3)[:, :1], alone.predict(5, 3), rtol=1e-12, atol=1e-12)


def test_goes_on_from_its_state(network: PVRNN, values: Tensor) -> None:
    first = ErrorRegression(network, 4, 6)
    follow(first, values[:, :7])
    second = ErrorRegression(network, 4, 6)
    second.load_state_dict(first.state_dict())
    for mine, theirs in zip(follow(first, values[:, 7:]), follow(second, values[:, 7:]), strict=True):
        assert torch.equal(mine.after, theirs.after)
    assert torch.equal(first.predict(4), second.predict(4))
    fresh = ErrorRegression(network, 4, 6)
    fresh.load_state_dict(ErrorRegression(network).state_dict())
    assert fresh.recent is None
    with pytest.raises(ValueError, match="window must be >= 4 as in the state, got 3"):
        ErrorRegression(network, 3).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="state_dict must hold values"):
        fresh.load_state_dict({"weights": 1})


def test_a_window_begins_at_the_state_that_the_left_step_reached(network: PVRNN, values: Tensor) -> None:
    regression = ErrorRegression(network, window=3, iterations=4)
    follow(regression, values[:, :3])
    full = regression.recent
    assert full is not None
    assert full.start is None
    reached = network.posterior(full.adaptive, deterministic=True).states[:, 0]
    regression.update(values[:, 3])
    slid = regression.recent
    assert slid is not None
    assert slid.start is not None
    torch.testing.assert_close(slid.start, reached)
    assert torch.equal(slid.values, values[:, 1:4])


def test_a_new_step_begins_as_the_prior_says(network: PVRNN, values: Tensor) -> None:
    regression = ErrorRegression(network, window=5, iterations=0)
    follow(regression, values)
    assert regression.recent is not None
    out = network.posterior(regression.recent.adaptive, regression.recent.start, deterministic=True)
    assert out.kl.abs().max() < 1e-12
    free = network.generate(12, 3, deterministic=True).mean[:, -5:]
    torch.testing.assert_close(out.mean, free)


def test_prediction_is_window_and_then_prior(network: PVRNN, values: Tensor) -> None:
    regression = ErrorRegression(network, window=5, iterations=5, deterministic=True)
    follow(regression, values)
    window = regression.recent
    assert window is not None
    state = network.posterior(window.adaptive, window.start, deterministic=True).states[:, -1]
    expected = network.generate(4, 3, state, deterministic=True).mean
    torch.testing.assert_close(regression.predict(4, num_samples=2), expected.expand(2, 3, 4, 2))
    assert regression.predict(4).shape == (1, 3, 4, 2)
    noisy = ErrorRegression(network, window=5, iterations=5)
    follow(noisy, values)
    samples = noisy.predict(4, num_samples=3)
    assert not torch.equal(samples[0], samples[1])
    assert torch.equal(noisy.predict(4, num_samples=3), samples)


def test_missing_observations_do_not_count(network: PVRNN, values: Tensor) -> None:
    mask = torch.tensor([[True, False, True, True]] * 3)
    broken = values[:, :4].clone()
    broken[:, 1] = math.nan
    zeroed = values[:, :4].clone()
    zeroed[:, 1] = 7.0
    one, other = (ErrorRegression(network, 4, 8) for _ in range(2))
    a, b = one.begin(broken, mask), other.begin(zeroed, mask)
    assert torch.equal(a.after, b.after)
    with pytest.raises(ValueError, match="finite where mask is true, got nan in row 0, step 1, number 0"):
        one.begin(broken)
    later = one.update(broken[:, 1], torch.zeros(3, dtype=torch.bool))
    assert later.after.isfinite().all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(network: PVRNN, values: Tensor, context: type) -> None:
    plain = ErrorRegression(network, 4, 6)
    wanted = follow(plain, values)
    with context():
        found = follow(ErrorRegression(network, 4, 6), values * 1.0)
    assert torch.equal(wanted[-1].after, found[-1].after)


def test_restarts_keep_the_best_of_each_stream(network: PVRNN, values: Tensor) -> None:
    single = ErrorRegression(network, 6, 0, meta_prior=0.0, seed=1).begin(values[:, :6]).after
    several = ErrorRegression(network, 6, 0, restarts=16, meta_prior=0.0, seed=1).begin(values[:, :6]).after
    assert (several < single + 1e-9).all()
    assert (several < single - 1e-6).any()


def test_says_when_the_loss_did_not_fall(network: PVRNN, values: Tensor) -> None:
    with pytest.warns(UserWarning, match="the window's loss did not fall: .* after 1 iterations; lower lr=50"):
        ErrorRegression(network, 6, 1, lr=50.0).begin(values[:, :6])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ErrorRegression(network, 6, 20).begin(values[:, :6])


def test_refusals(network: PVRNN, values: Tensor) -> None:
    regression = ErrorRegression(network, window=4, iterations=1)
    with pytest.raises(RuntimeError, match="needs an observation"):
        regression.predict(1)
    with pytest.raises(ValueError, match="from 1 to window=4 steps, got 12"):
        regression.begin(values)
    with pytest.raises(ValueError, match="observations must have 2 numbers, got 1"):
        regression.update(values[:, 0, :1])
    regression.update(values[:, 0])
    with pytest.raises(ValueError, match=r"x must be \(3, 2\), got \(2, 2\)"):
        regression.update(values[:2, 0])
    for arguments, message in (
        ({"window": 0}, "window must be >= 1, got 0"),
        ({"iterations": -1}, "iterations must be >= 0"),
        ({"restarts": 0}, "restarts must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"lr": math.inf}, "lr must be > 0 and finite"),
        ({"meta_prior": -0.1}, "meta_prior must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ErrorRegression(network, **arguments)
