"""The few networks that recipes need."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Multilayer perceptron on flattened inputs.

    Args:
        in_features: number of input values per example after flattening.
        hidden_features: width of each hidden layer; empty for a linear model.
        out_features: number of outputs.
        activation: name of a ``torch.nn`` activation class without required arguments, such as ``"ReLU"``.
        bias: whether the layers have biases.

    Shape:
        ``(batch, ...)`` with ``in_features`` values per example -> ``(batch, out_features)``.

    Raises:
        ValueError: a width is below 1, or ``activation`` is not the name of a ``torch.nn`` class.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: list[int],
        out_features: int,
        activation: str = "ReLU",
        bias: bool = True,
    ) -> None:
        widths = [in_features, *hidden_features, out_features]
        if min(widths) < 1:
            raise ValueError(f"in_features, hidden_features and out_features must be at least 1, got {widths}")
        if not isinstance(getattr(nn, activation, None), type):
            raise ValueError(f"activation must name a torch.nn class such as 'ReLU' or 'Tanh', got {activation!r}")
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(widths[:-1]):
            layers += [nn.Linear(fan_in, fan_out, bias), getattr(nn, activation)()]
        super().__init__(*layers, nn.Linear(widths[-2], out_features, bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, ...)`` to ``(batch, out_features)``."""
        return super().forward(x)


class PostNormMLP(nn.Sequential):
    """Multilayer perceptron whose every layer, also the last, ends in ReLU and a batch normalisation without weights.

    The classifiers of consensus-based optimization (arXiv 2306.09778) have this shape: ``PostNormMLP(784, [10])`` and
    ``PostNormMLP(784, [20, 10, 10, 10])``.

    Args:
        in_features: number of input values per example after flattening.
        widths: width of each layer; the last is the number of outputs.

    Shape:
        ``(batch, ...)`` with ``in_features`` values per example -> ``(batch, widths[-1])``.

    Raises:
        ValueError: no layer, or a width below 1.
    """

    def __init__(self, in_features: int, widths: list[int]) -> None:
        if not widths or min(in_features, *widths) < 1:
            raise ValueError(f"in_features and widths must be at least 1, got {in_features} and {widths}")
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise([in_features, *widths]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.BatchNorm1d(fan_out, eps=1e-4, affine=False)]
        super().__init__(*layers)


class PostNormCNN(nn.Sequential):
    """Two 5x5 convolutions with 4 and 3 channels, each pooled by 2, and a dense layer; see :class:`PostNormMLP`.

    Args:
        num_classes: number of outputs, >= 1.
        in_channels: channels of the images, >= 1.
        image_size: height and width, >= 16.

    Shape:
        ``(batch, in_channels, image_size, image_size)`` -> ``(batch, num_classes)``.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        if num_classes < 1 or in_channels < 1 or image_size < 16:
            raise ValueError(
                "num_classes and in_channels must be at least 1 and image_size at least 16, got "
                f"{num_classes}, {in_channels} and {image_size}"
            )
        layers: list[nn.Module] = []
        for fan_in, fan_out in ((in_channels, 4), (4, 3)):
            norm = nn.BatchNorm2d(fan_out, eps=1e-4, affine=False)
            layers += [nn.Conv2d(fan_in, fan_out, 5), nn.ReLU(), norm, nn.MaxPool2d(2)]
        side = ((image_size - 4) // 2 - 4) // 2
        head = [nn.Linear(3 * side**2, num_classes), nn.ReLU(), nn.BatchNorm1d(num_classes, eps=1e-4, affine=False)]
        super().__init__(*layers, nn.Flatten(), *head)


class LinearFeedback(nn.Module):
    """A fixed linear controller ``u = -K x``, for example the expert of an imitation experiment.

    Args:
        gain: K, one row of ``in_features`` numbers for each action.

    Shape:
        ``(batch, in_features)`` -> ``(batch, actions)``.

    Raises:
        ValueError: ``gain`` is no matrix.
    """

    gain: Tensor

    def __init__(self, gain: list[list[float]]) -> None:
        super().__init__()
        if not gain or not gain[0] or any(len(row) != len(gain[0]) for row in gain):
            raise ValueError(f"gain must be a matrix, got {gain}")
        self.register_buffer("gain", torch.tensor(gain, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Map states to actions."""
        return -x @ self.gain.T


class PretrainedNetwork(nn.Module):
    """A frozen network with weights from a file, for example a trained expert.

    Args:
        network: the architecture.
        checkpoint: a file that ``torch.save(network.state_dict(), ...)`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file is of another architecture.
    """

    def __init__(self, network: nn.Module, checkpoint: str) -> None:
        super().__init__()
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(
                f"PretrainedNetwork lacks {checkpoint}: train the network, and torch.save(network.state_dict(), path)"
            )
        network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
        self.network = network.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """What the network does."""
        return self.network(x)


class LoRANetwork(nn.Module):
    """A frozen network whose linear layers learn low-rank updates ``B A`` (LoRA of peft, arXiv 2106.09685).

    Args:
        network: what to adapt; its weights no longer train. ``PretrainedNetwork`` loads it from a file.
        rank: columns of B and rows of A, >= 1.
        init_scale: A starts at this multiple of peft's initialization, > 0; B at zero.

    Raises:
        ValueError: an argument out of range, or a network without linear layers.
    """

    def __init__(self, network: nn.Module, rank: int, init_scale: float = 1.0) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if not 0 < init_scale < float("inf"):
            raise ValueError(f"init_scale must be > 0 and finite, got {init_scale}")
        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"network has no torch.nn.Linear to adapt: {type(network).__name__}")
        self.network = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), network)
        for name, parameter in self.network.named_parameters():
            if "lora_A" in name:
                parameter.data.mul_(init_scale)

    def forward(self, x: Tensor) -> Tensor:
        """What the adapted network does."""
        return self.network(x)


class CIFARResNet(nn.Sequential):
    """Residual network for 32x32 images, with parameter-free shortcuts (He et al. 2016, arXiv 1512.03385, §4.2).

    Three stages of ``(depth - 2) / 6`` basic blocks with 16, 32 and 64 channels; depth 20 has 269,722 parameters for
    ten classes. Convolutions have Kaiming-normal weights and no biases.

    Args:
        depth: number of layers with weights: 8, 14, 20, 26, 32, 38, 44, 50, 56 ...
        num_classes: number of outputs.
        in_channels: channels of the images.

    Shape:
        ``(batch, in_channels, 32, 32)`` -> ``(batch, num_classes)``; any height and width divisible by 4 will do.

    Raises:
        ValueError: ``depth`` is not 6n + 2 with n >= 1.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_channels: int = 3) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (20, 32, 44, 56 ...), got {depth}")
        blocks: list[nn.Module] = []
        channels = 16
        for width in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                blocks.append(_BasicBlock(channels, width))
                channels = width
        stem = [_conv3x3(in_channels, 16), nn.BatchNorm2d(16), nn.ReLU()]
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
        _initialize_convolutions(self)


class WideResNet(nn.Sequential):
    """Wide residual network with pre-activation blocks (Zagoruyko and Komodakis 2016, arXiv 1605.07146).

    Three stages of ``(depth - 4) / 6`` blocks with 16, 32 and 64 times ``widen_factor`` channels. WRN-22-2 is
    ``depth=22, widen_factor=2``.

    Args:
        depth: 6n + 4 with n >= 1: 10, 16, 22, 28, 34, 40 ...
        widen_factor: multiplier of the channels, >= 1.
        num_classes: number of outputs.
        dropout: probability of dropping a value between the two convolutions of a block, in [0, 1).
        in_channels: channels of the images.

    Shape:
        ``(batch, in_channels, 32, 32)`` -> ``(batch, num_classes)``; any height and width divisible by 4 will do.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        depth: int = 22,
        widen_factor: int = 2,
        num_classes: int = 100,
        dropout: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6n + 4 with n >= 1 (16, 22, 28, 40 ...), got {depth}")
        if widen_factor < 1:
            raise ValueError(f"widen_factor must be at least 1, got {widen_factor}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        blocks: list[nn.Module] = []
        channels = 16
        for stage, width in enumerate((16 * widen_factor, 32 * widen_factor, 64 * widen_factor)):
            for block in range((depth - 4) // 6):
                blocks.append(_PreActivationBlock(channels, width, 2 if stage and not block else 1, dropout))
                channels = width
        head = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(_conv3x3(in_channels, 16), *blocks, *head, nn.Linear(channels, num_classes))
        _initialize_convolutions(self)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the width grows, the shortcut takes every second pixel and pads channels with 0."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == channels else 2
        self.padding = (channels - in_channels) // 2
        self.conv1 = _conv3x3(in_channels, channels, self.stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = x[..., :: self.stride, :: self.stride]
        shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        return (residual + shortcut).relu()


class _PreActivationBlock(nn.Module):
    """Normalisation and ReLU before each of two 3x3 convolutions; a 1x1 shortcut where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3x3(channels, channels)
        same = in_channels == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.bn1(x).relu()
        residual = self.conv2(self.dropout(self.bn2(self.conv1(activated)).relu()))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def _conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)


def _initialize_convolutions(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
