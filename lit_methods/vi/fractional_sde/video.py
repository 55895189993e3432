"""The paper's networks for video: encoder with content and dynamics, and decoder."""

import torch
from torch import Tensor, nn

from lit_methods.vi.fractional_sde.networks import Encoding, check_widths


def _block(inputs: int, outputs: int, *last: nn.Module) -> nn.Sequential:
    groups = min(8, outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), *last, nn.GroupNorm(groups, outputs), nn.SiLU())


class VideoEncoder(nn.Module):
    """Frames to a content vector, dynamics ``h(t)`` and a Gaussian of the first state (the paper's network).

    Blocks of convolution, pooling, normalisation and SiLU halve the frame; two convolutions in time give ``h``. The
    content is made of the median over all frames. A frame that is masked is replaced by zeros, and left out of the
    median.

    Args:
        state_dim: >= 1.
        size: height and width of a frame, ``4 * 2^blocks`` with 1 to 4 blocks: 8, 16, 32 or 64.
        channels: of a frame, >= 1.
        num_features: ``F``, width of the first block and of ``h``; 8 or a multiple of it.
        num_contents: features of the content, >= 1.

    Raises:
        ValueError: an argument out of range; fewer than three frames.
    """

    def __init__(
        self, state_dim: int, size: int = 64, channels: int = 1, num_features: int = 64, num_contents: int = 64
    ) -> None:
        super().__init__()
        widths = frame_widths(size, num_features)
        check_widths((), state_dim=state_dim, channels=channels, num_contents=num_contents)
        f = num_features
        blocks = [_block(a, b, nn.MaxPool2d(2)) for a, b in zip([channels, *widths], widths, strict=False)]
        self.frames = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(16 * widths[-1], f))
        self.content = nn.Sequential(nn.Linear(f, f), nn.SiLU(), nn.Linear(f, num_contents))
        self.infer = nn.Sequential(nn.Conv1d(f, f, 3, padding=1), nn.SiLU(), nn.Conv1d(f, f, 3, padding=1))
        self.start = nn.Sequential(
            nn.Linear(4 * f, f), nn.SiLU(), nn.Linear(f, f), nn.SiLU(), nn.Linear(f, 2 * state_dim)
        )

    def forward(self, times: Tensor, values: Tensor, mask: Tensor) -> Encoding:
        """Encode frames ``(batch, T, channels, size, size)``, seen where ``mask`` ``(batch, T)`` says."""
        if values.shape[1] < 3:
            raise ValueError(f"values must hold at least 3 frames, got {values.shape[1]}")
        seen = torch.where(mask[..., None, None, None], values, 0.0)
        frames = self.frames(seen.flatten(0, 1)).unflatten(0, values.shape[:2])
        # A masked frame does not vote; a series without any frame has the zero content.
        votes = torch.where(mask[..., None], frames.float(), torch.nan)
        content = self.content(votes.nanmedian(1).values.nan_to_num())
        hidden = self.infer(frames.transpose(1, 2)).transpose(1, 2)
        mean, log_variance = self.start(torch.cat([hidden[:, 0], frames[:, :3].flatten(1)], -1)).chunk(2, -1)
        return Encoding(mean, log_variance, hidden, content)


class VideoDecoder(nn.Module):
    """A content vector and a state to a frame in [0, 1] (the paper's network); all frames at once.

    Args:
        state_dim: >= 1.
        size: height and width of a frame: 8, 16, 32 or 64.
        channels: of a frame, >= 1.
        num_features: ``F``, 8 or a multiple of it.
        num_contents: features of the content, >= 1.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, state_dim: int, size: int = 64, channels: int = 1, num_features: int = 64, num_contents: int = 64
    ) -> None:
        super().__init__()
        widths = frame_widths(size, num_features)[::-1]
        check_widths((), state_dim=state_dim, channels=channels, num_contents=num_contents)
        self.first = nn.Linear(num_contents + state_dim, 16 * widths[0])
        blocks: list[nn.Module] = []
        for a, b in zip(widths, [*widths[1:], num_features], strict=True):
            blocks += [_block(a, b), nn.Upsample(scale_factor=2, mode="nearest")]
        self.blocks = nn.Sequential(
            *blocks, _block(num_features, num_features), nn.Conv2d(num_features, channels, 3, padding=1), nn.Sigmoid()
        )

    def forward(self, x: Tensor, content: Tensor | None) -> Tensor:
        """States ``(batch, T, state_dim)`` and content ``(batch, num_contents)`` to ``(batch, T, channels, h, w)``."""
        if content is None:
            raise ValueError("content must be given, got None: VideoDecoder needs VideoEncoder, or one like it")
        inputs = torch.cat([content[:, None].expand(-1, x.shape[1], -1), x.to(content.dtype)], -1)
        hidden = self.first(inputs.flatten(0, 1)).unflatten(-1, (-1, 4, 4))
        return self.blocks(hidden).unflatten(0, x.shape[:2])


def frame_widths(size: int, num_features: int) -> list[int]:
    """Channels of the blocks that bring a frame down to 4 x 4: ``F, 2F, 4F, 4F`` for 64 x 64."""
    sizes = {8: 1, 16: 2, 32: 3, 64: 4}
    if size not in sizes:
        raise ValueError(f"size must be one of {list(sizes)}, got {size}")
    if num_features < 8 or num_features % 8:
        raise ValueError(f"num_features must be a multiple of 8, got {num_features}")
    return [num_features * factor for factor in (1, 2, 4, 4)][: sizes[size]]
