import pytest
import torch
from torch import nn

from lit_methods.nets import (
    MLP,
    CIFARResNet,
    LinearFeedback,
    LoRANetwork,
    PostNormCNN,
    PostNormMLP,
    PretrainedNetwork,
    WideResNet,
)


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


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154)])
def test_cifar_resnets_have_the_published_sizes(depth, parameters) -> None:
    """0.27M and 0.46M in table 6 of He et al."""
    net = CIFARResNet(depth)
    assert sum(p.numel() for p in net.parameters()) == parameters
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(convolutions) == depth
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_resnet_shortcut_subsamples_and_pads() -> None:
    block = next(m for m in CIFARResNet(8).modules() if getattr(m, "stride", None) == 2 and hasattr(m, "padding"))
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(2, 16, 8, 8)
    y = block.eval()(x)
    torch.testing.assert_close(y[:, 8:24], x[..., ::2, ::2])
    assert y[:, :8].abs().max() == y[:, 24:].abs().max() == 0


@pytest.mark.parametrize(
    ("depth", "widen_factor", "parameters"),
    [(40, 4, 8_949_210), (16, 4, 2_748_890), (40, 2, 2_243_546)],
)
def test_wide_resnets_have_the_published_sizes(depth, widen_factor, parameters) -> None:
    """8.9M, 2.7M and 2.2M in tables of Zagoruyko and Komodakis."""
    net = WideResNet(depth, widen_factor, num_classes=10)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_wide_resnet_runs_and_drops_out() -> None:
    net = WideResNet(10, 1, 7, dropout=0.5)
    x = torch.randn(2, 3, 32, 32)
    assert net(x).shape == (2, 7)
    assert not torch.equal(net(x), net(x))
    torch.testing.assert_close(net.eval()(x), net(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CIFARResNet(21), "depth must be 6n \\+ 2.*got 21"),
        (lambda: WideResNet(21), "depth must be 6n \\+ 4.*got 21"),
        (lambda: WideResNet(22, 0), "widen_factor must be at least 1, got 0"),
        (lambda: WideResNet(22, dropout=1.0), "dropout must be in"),
    ],
)
def test_resnets_refuse_bad_arguments(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_networks_without_biases() -> None:
    assert [name for name, _ in MLP(4, [3], 2, bias=False).named_parameters()] == ["1.weight", "3.weight"]


def test_linear_feedback() -> None:
    assert LinearFeedback([[1.0, 2.0]])(torch.tensor([[1.0, 1.0], [0.0, 3.0]])).tolist() == [[-3.0], [-6.0]]


def test_pretrained_network_is_frozen_and_names_missing_files(tmp_path) -> None:
    trained = MLP(4, [3], 2)
    torch.save(trained.state_dict(), tmp_path / "expert.pt")
    loaded = PretrainedNetwork(MLP(4, [3], 2), str(tmp_path / "expert.pt"))
    torch.testing.assert_close(loaded(torch.ones(1, 4)), trained(torch.ones(1, 4)).detach())
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(FileNotFoundError, match=r"lacks nowhere.pt"):
        PretrainedNetwork(MLP(4, [3], 2), "nowhere.pt")


def test_lora_trains_low_rank_updates_only() -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = MLP(6, [5], 4)
    weights = [layer.weight.clone() for layer in plain if isinstance(layer, nn.Linear)]
    x = torch.randn(3, 6)
    before = plain(x)
    net = LoRANetwork(plain, rank=2, init_scale=0.5)
    torch.testing.assert_close(net(x), before)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert [tuple(p.shape) for p in trained.values()] == [(2, 6), (5, 2), (2, 5), (4, 2)]
    largest = [p.abs().max() * p.shape[1] ** 0.5 for name, p in trained.items() if "lora_A" in name]
    assert all(0.3 < value <= 0.5 for value in largest)  # peft: uniform in +- 1 / sqrt(columns)
    for p in trained.values():
        nn.init.normal_(p)
    a1, b1, a2, b2 = trained.values()
    hidden = nn.functional.linear(x, weights[0] + b1 @ a1, plain[1].base_layer.bias).relu()
    torch.testing.assert_close(net(x), nn.functional.linear(hidden, weights[1] + b2 @ a2, plain[3].base_layer.bias))


def test_lora_refuses_bad_arguments() -> None:
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="rank must be"):
        LoRANetwork(MLP(4, [3], 2), 0)
    with pytest.raises(ValueError, match="init_scale must be"):
        LoRANetwork(MLP(4, [3], 2), 2, 0.0)
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear"):
        LoRANetwork(nn.ReLU(), 2)


def test_post_norm_networks_have_the_stated_layers() -> None:
    shallow, deep, cnn = PostNormMLP(784, [10]), PostNormMLP(784, [20, 10, 10, 10]), PostNormCNN()
    images = torch.rand(50, 1, 28, 28)
    for net, parameters in ((shallow, 7850), (deep, 15700 + 210 + 110 + 110), (cnn, 104 + 303 + 490)):
        assert sum(p.numel() for p in net.parameters()) == parameters
        outputs = net(images)
        assert outputs.shape == (50, 10)
        torch.testing.assert_close(outputs.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    hidden = torch.relu(shallow[1](images.flatten(1)))
    expected = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-4).sqrt()
    torch.testing.assert_close(shallow(images), expected)
    with pytest.raises(ValueError, match="in_features and widths must be"):
        PostNormMLP(4, [])
    with pytest.raises(ValueError, match="image_size at least 16"):
        PostNormCNN(image_size=12)
