"""Log-normal weights, split biases and groups."""

import math

import pytest
import torch
from torch import nn

from lit_methods.optim import (
    AdamWExponentiated,
    ExponentiatedGradient,
    SplitBias,
    dale_init_,
    eg_param_groups,
    lognormal_,
)


@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 300 * 9), ("fan_out", 200 * 9)])
def test_lognormal_has_the_stated_moments(mode: str, fan: int) -> None:
    w = lognormal_(torch.empty(200, 300, 3, 3, dtype=torch.float64), gain=2.0, mode=mode, mean_std_ratio=1.5)  # type: ignore[arg-type]
    assert float(w.std()) == pytest.approx(2 / fan**0.5, rel=0.02)
    assert float(w.sign().mean()) == pytest.approx(0, abs=0.01)
    size = w.abs()
    assert float(size.mean() / size.std()) == pytest.approx(1.5, rel=0.02)
    log = size.log()
    assert float(((log - log.mean()) / log.std()).pow(3).mean()) == pytest.approx(0, abs=0.02), "log-normal, not skewed"


def test_lognormal_is_the_generators_and_may_be_positive() -> None:
    draws = [lognormal_(torch.empty(4, 5), generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert (lognormal_(torch.empty(50, 50), signs="positive") > 0).all()
    for bad, message in [
        ({"gain": 0.0}, "gain must be > 0"),
        ({"mean_std_ratio": -1.0}, "mean_std_ratio must be > 0"),
        ({"mode": "fan"}, "mode must be one of"),
        ({"signs": "negative"}, "signs must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            lognormal_(torch.empty(2, 2), **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tensor must have at least 2 dimensions to have a fan, got shape \(3,\)"):
        lognormal_(torch.empty(3))


def test_dale_init_draws_weights_and_splits_biases() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 100), nn.Linear(100, 2, bias=False)
    )
    x = torch.randn(2, 3, 3, 3)
    assert dale_init_(net) is net
    conv, norm, linear = net[0], net[1], net[3]
    assert float(linear.weight.detach().std()) == pytest.approx(math.sqrt(2 / 100), rel=0.1)
    for layer, bound in ((conv, 27**-0.5), (norm, 1e-4), (linear, 1 / 8)):
        positive, negative = layer.parametrizations.bias.original0, layer.parametrizations.bias.original1
        assert 0 < float(positive.detach().min()) < float(positive.detach().max()) <= math.sqrt(2) * bound
        assert 0 > float(negative.detach().max()) > float(negative.detach().min()) >= -math.sqrt(2) * bound
        torch.testing.assert_close(layer.bias, positive + negative)
    assert net(x).shape == (2, 2)
    assert norm.weight.eq(1).all(), "gains stay"


def test_a_split_bias_crosses_zero_where_a_plain_one_cannot() -> None:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.bias, 0.5)
    nn.utils.parametrize.register_parametrization(layer, "bias", SplitBias())
    assert layer.bias.item() == pytest.approx(0.5)
    optimizer = ExponentiatedGradient(layer.parameters(), lr=0.2, on_zero="raise")
    for _ in range(200):
        optimizer.zero_grad()
        (layer.bias + 1).square().sum().backward()
        optimizer.step()
    assert layer.bias.item() == pytest.approx(-1, abs=1e-3)
    with pytest.raises(ValueError, match="margin must be > 0"):
        SplitBias(0.0)


def test_groups_hold_each_trainable_parameter_once() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))
    nn.init.zeros_(net[3].weight)
    net[2].weight.requires_grad_(False)
    nn.utils.parametrize.register_parametrization(net[0], "bias", SplitBias())
    groups = eg_param_groups(net, gd_lr=1e-3)
    names = {group["algorithm"]: [name for name, _ in group["params"]] for group in groups}
    assert names == {
        "eg": ["0.weight", "0.parametrizations.bias.original0", "0.parametrizations.bias.original1"],
        "gd": ["1.weight", "1.bias", "2.bias", "3.weight", "3.bias"],
    }
    optimizer = AdamWExponentiated(groups, lr=0.1, weight_decay=0.1, on_zero="raise")
    eg, gd = optimizer.param_groups
    assert (eg["lr"], eg["weight_decay"], gd["lr"], gd["weight_decay"]) == (0.1, 0.1, 1e-3, 0.0)
    assert [group["algorithm"] for group in eg_param_groups(nn.LayerNorm(3))] == ["gd"]
    with pytest.raises(ValueError, match="model has no trainable parameters: ReLU"):
        eg_param_groups(nn.ReLU())


def test_tied_weights_are_in_a_group_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    assert [len(group["params"]) for group in eg_param_groups(net)] == [1]
