import pytest
import torch

from lit_methods.diffusion import ImageUNet


def test_images_of_any_size_come_back_in_their_size_and_times_and_labels_matter() -> None:
    torch.manual_seed(0)
    net = ImageUNet(1, [32, 32, 64], 1, attention_levels=[2], attention_head_dim=32, num_classes=3).eval()
    x, t = torch.randn(2, 1, 28, 27), torch.tensor([0.2, 0.2])
    label = torch.tensor([0, 3])  # the null label is there too
    out = net(x, t, label)
    assert out.shape == x.shape
    assert not torch.allclose(out, net(x, t + 0.01, label), atol=1e-5), "times in [0, 1] are scaled"
    assert not torch.allclose(out[:1], net(x, t, label.flip(0))[:1], atol=1e-5)
    assert type(net.unet.down_blocks[2]).__name__ == type(net.unet.up_blocks[0]).__name__.replace("Up", "Down")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels and layers_per_block must be >= 1, got 0"),
        ({"block_out_channels": [40]}, r"block_out_channels must be divisible by norm_num_groups=32, got \[40\]"),
        ({"attention_levels": [5]}, r"attention_levels must be in \[0, 1, 2\], got \[5\]"),
        ({"time_scale": 0.0}, "time_scale must be > 0, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageUNet(**arguments)
