import pytest
import torch
from torch import nn

from lit_methods.nets import MLP


def test_mlp_is_the_stated_chain_of_layers() -> None:
    net = MLP(12, [5, 4], 3, activation="Tanh")
    assert [type(layer) for layer in net] == [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    x = torch.randn(7, 3, 2, 2)
    first, second, last = (layer for layer in net if isinstance(layer, nn.Linear))
    torch.testing.assert_close(net(x), last(second(first(x.flatten(1)).tanh()).tanh()))
    assert [type(layer) for layer in MLP(12, [], 3)] == [nn.Flatten, nn.Linear]


def test_mlp_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        MLP(4, [0], 2)
    with pytest.raises(ValueError, match="activation must name"):
        MLP(4, [3], 2, activation="Relu6000")
