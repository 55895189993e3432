from collections.abc import Callable

import pytest
import torch
from torch import nn

from lit_methods.diffusion import Denoiser, FeatureDiscriminator, PointDiscriminator, TimeMLP


def norms(head: nn.Module) -> list[int]:
    return [m.num_groups for m in head.modules() if isinstance(m, nn.GroupNorm)]


@pytest.mark.parametrize(
    ("shape", "convolutions", "groups"),
    [
        ([256, 32, 32], 5, [32] * 4),  # 32 to 16 to 8 to 4 to 1, and to the logit
        ([256, 8, 8], 3, [32] * 2),
        ([768, 8, 8], 3, [32] * 2),
        ([16, 4, 4], 2, [4]),
        ([60, 8, 8], 3, [30] * 2),
    ],
)
def test_heads_of_feature_maps_are_those_of_the_card(shape: list[int], convolutions: int, groups: list[int]) -> None:
    discriminator = FeatureDiscriminator(shapes=[shape])
    assert sum(isinstance(m, nn.Conv2d) for m in discriminator.modules()) == convolutions
    assert norms(discriminator) == groups
    assert discriminator([torch.randn(2, *shape)]).shape == (2, 1)


def test_there_is_a_head_for_each_feature_of_any_kind() -> None:
    shapes = [[8, 16, 16], [16, 32], [4, 6], [5], [8, 7, 7], [8, 2, 2]]
    discriminator = FeatureDiscriminator(shapes=shapes)
    logits = discriminator([torch.randn(3, *shape) for shape in shapes])
    assert logits.shape == (3, 6)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in discriminator.parameters())
    with pytest.raises(ValueError, match="features must be as many as heads, 6, got 1"):
        discriminator([torch.randn(3, 8, 16, 16)])


def test_features_stop_the_network_and_come_with_its_output() -> None:
    net = TimeMLP([3], width=8, blocks=3)
    denoiser = Denoiser(net, "edm", "edm", "edm")
    x, t = torch.randn(2, 3), torch.tensor([0.5, 2.0])
    ran: list[str] = []
    for name, block in net.named_modules():
        block.register_forward_hook(lambda *_, name=name: ran.append(name))
    (first,) = denoiser.features(x, t, ["blocks.0"])
    assert "blocks.1" not in ran
    out, (again, last) = denoiser.with_features(x, t, ["blocks.0", "blocks.2"])
    assert torch.equal(first, again)
    assert torch.equal(out, denoiser(x, t))
    assert torch.equal(last, denoiser.features(x, t)[0]), "the last block is what a TimeMLP names itself"
    assert denoiser.sample_shape == [3]
    with pytest.raises(ValueError, match="None needs a network with feature_layers, and Linear has none"):
        Denoiser(nn.Linear(3, 3)).features(x, t)


def test_the_point_discriminator_sees_standardised_points() -> None:
    discriminator = PointDiscriminator(2, data_std=3.0)
    seen: list[torch.Tensor] = []
    discriminator.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert discriminator(torch.tensor([[5.0, 10.0]]), torch.tensor([4.0])).shape == (1,)
    torch.testing.assert_close(seen[0], torch.tensor([[1.0, 2.0, 1.0, 4.0, 0.5 * torch.tensor(4.0).log()]]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FeatureDiscriminator(["a"], [[3], [4]]), "shapes must be as many as layers, 1, got 2"),
        (lambda: FeatureDiscriminator(shapes=[[2, 3, 4, 5]]), "shapes must be of vectors, tokens or feature maps"),
        (lambda: FeatureDiscriminator(shapes=[[5, 8]]), r"shapes of tokens must be those of a square .*, got \[5, 8\]"),
        (lambda: PointDiscriminator(0), "dim and width must be >= 1"),
        (lambda: PointDiscriminator(1, data_std=0.0), "data_std must be > 0"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
