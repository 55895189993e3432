"""The few networks that recipes need."""

from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Multilayer perceptron on flattened inputs.

    Args:
        in_features: number of input values per example after flattening.
        hidden_features: width of each hidden layer; empty for a linear model.
        out_features: number of outputs.
        activation: name of a ``torch.nn`` activation class without required arguments, such as ``"ReLU"``.

    Shape:
        ``(batch, ...)`` with ``in_features`` values per example -> ``(batch, out_features)``.

    Raises:
        ValueError: a width is below 1, or ``activation`` is not the name of a ``torch.nn`` class.
    """

    def __init__(
        self, in_features: int, hidden_features: list[int], out_features: int, activation: str = "ReLU"
    ) -> None:
        widths = [in_features, *hidden_features, out_features]
        if min(widths) < 1:
            raise ValueError(f"in_features, hidden_features and out_features must be at least 1, got {widths}")
        if not isinstance(getattr(nn, activation, None), type):
            raise ValueError(f"activation must name a torch.nn class such as 'ReLU' or 'Tanh', got {activation!r}")
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(widths[:-1]):
            layers += [nn.Linear(fan_in, fan_out), getattr(nn, activation)()]
        super().__init__(*layers, nn.Linear(widths[-2], out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, ...)`` to ``(batch, out_features)``."""
        return super().forward(x)
