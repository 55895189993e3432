"""The UNet of diffusers as a network of this package."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class ImageUNet(nn.Module):
    """``diffusers.UNet2DModel`` as ``net(x, t, cond)``, for images of any size.

    Images are padded with zeros to a size that can be halved at every level, and the result is cropped. Times are
    multiplied by ``time_scale``: an embedding made for 0 to 1000 does not see times in [0, 1].

    Args:
        channels: of the images, >= 1.
        block_out_channels: width of each level, divisible by ``norm_num_groups``.
        layers_per_block: residual blocks at each level, >= 1.
        attention_levels: levels, counted from 0, with self-attention.
        attention_head_dim: width of an attention head.
        norm_num_groups: groups of the normalisations.
        dropout: probability, in [0, 1).
        time_scale: factor of the times, > 0.
        num_classes: number of class labels that may be given as ``cond``, without the null one; ``None``: none.

    Shape:
        ``(batch, channels, height, width)`` and times ``(batch,)`` -> ``(batch, channels, height, width)``.

    Raises:
        ImportError: diffusers is not installed (the extra ``diffusion``).
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        channels: int = 1,
        block_out_channels: Sequence[int] = (128, 256, 256),
        layers_per_block: int = 2,
        attention_levels: Sequence[int] = (1,),
        attention_head_dim: int = 64,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        time_scale: float = 1000.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise ImportError("ImageUNet needs diffusers: pip install 'lit-methods[diffusion]'") from error
        levels = range(len(block_out_channels))
        if channels < 1 or layers_per_block < 1:
            raise ValueError(f"channels and layers_per_block must be >= 1, got {channels} and {layers_per_block}")
        if not levels or any(width % norm_num_groups for width in block_out_channels):
            raise ValueError(
                f"block_out_channels must be divisible by norm_num_groups={norm_num_groups}, got "
                f"{list(block_out_channels)}"
            )
        if not set(attention_levels) <= set(levels):
            raise ValueError(f"attention_levels must be in {list(levels)}, got {list(attention_levels)}")
        if not 0 < time_scale < float("inf"):
            raise ValueError(f"time_scale must be > 0, got {time_scale}")
        down = ["AttnDownBlock2D" if level in attention_levels else "DownBlock2D" for level in levels]
        up = ["AttnUpBlock2D" if level in attention_levels else "UpBlock2D" for level in reversed(levels)]
        self.unet: Any = UNet2DModel(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            dropout=dropout,
            num_class_embeds=None if num_classes is None else num_classes + 1,
        )
        self.multiple = 2 ** (len(block_out_channels) - 1)
        self.time_scale = time_scale

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """A prediction for noisy images ``x`` at times ``t``, told of class labels where it takes any."""
        height, width = x.shape[-2:]
        padded = nn.functional.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        out: Tensor = self.unet(padded, t * self.time_scale, class_labels=cond, return_dict=False)[0]
        return out[..., :height, :width]
