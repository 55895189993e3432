"""The networks of the reinforcement-learning recipes, and running moments to normalise what they see."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

Initialization = Literal["orthogonal", "default"]
_LOG_STD_RANGE = (-20.0, 2.0)


class GaussianPolicy(nn.Module):
    """Diagonal Gaussian policy; its standard deviations do not depend on the observation.

    Args:
        observation_size: numbers in one observation, >= 1.
        action_size: numbers in one action, >= 1.
        hidden_features: width of each hidden layer.
        activation: name of a ``torch.nn`` activation class.
        initialization: "orthogonal" (gain sqrt(2), 0.01 for the means, zero biases) or torch's "default".
        log_std: initial logarithm of the standard deviations.

    Shape:
        ``(..., observation_size)`` -> distribution of ``(..., action_size)``.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden_features: Sequence[int] = (64, 64),
        activation: str = "Tanh",
        initialization: Initialization = "orthogonal",
        log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.mean = _mlp(observation_size, hidden_features, action_size, activation, initialization, 0.01)
        self.log_std = nn.Parameter(torch.full((action_size,), log_std))

    def forward(self, observations: Tensor) -> Independent:
        """Distribution of the actions."""
        mean = self.mean(observations).float()
        return Independent(Normal(mean, self.log_std.exp().expand_as(mean), validate_args=False), 1)


class CategoricalPolicy(nn.Module):
    """Policy over a finite number of actions.

    Args:
        observation_size: numbers in one observation, >= 1.
        num_actions: number of actions, >= 2.
        hidden_features: width of each hidden layer.
        activation: name of a ``torch.nn`` activation class.
        initialization: as in :class:`GaussianPolicy`.

    Shape:
        ``(..., observation_size)`` -> distribution of ``(...)`` int64 actions.
    """

    def __init__(
        self,
        observation_size: int,
        num_actions: int,
        hidden_features: Sequence[int] = (64, 64),
        activation: str = "Tanh",
        initialization: Initialization = "orthogonal",
    ) -> None:
        super().__init__()
        self.logits = _mlp(observation_size, hidden_features, num_actions, activation, initialization, 0.01)

    def forward(self, observations: Tensor) -> Categorical:
        """Distribution of the actions."""
        return Categorical(logits=self.logits(observations).float(), validate_args=False)


class ValueNetwork(nn.Module):
    """State value.

    Args:
        observation_size: numbers in one observation, >= 1.
        hidden_features: width of each hidden layer.
        activation: name of a ``torch.nn`` activation class.
        initialization: as in :class:`GaussianPolicy`, with gain 1 for the output.

    Shape:
        ``(..., observation_size)`` -> ``(...)``.
    """

    def __init__(
        self,
        observation_size: int,
        hidden_features: Sequence[int] = (64, 64),
        activation: str = "Tanh",
        initialization: Initialization = "orthogonal",
    ) -> None:
        super().__init__()
        self.value = _mlp(observation_size, hidden_features, 1, activation, initialization, 1.0)

    def forward(self, observations: Tensor) -> Tensor:
        """Value of each observation."""
        return self.value(observations).squeeze(-1).float()


class TanhGaussianActor(nn.Module):
    """Gaussian whose samples a tanh brings into (-1, 1), for off-policy methods; both moments are learned.

    Args:
        observation_size: numbers in one observation, >= 1.
        action_size: numbers in one action, >= 1.
        hidden_features: width of each hidden layer.
        activation: name of a ``torch.nn`` activation class.
        low: smallest value of each action in the environment's units; one number, or one per action.
        high: largest value of each action.

    Shape:
        ``(..., observation_size)`` -> mean and log standard deviation, before the tanh, of ``(..., action_size)`` each.

    Raises:
        ValueError: bounds that are infinite or not in order.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden_features: Sequence[int] = (256, 256),
        activation: str = "ReLU",
        low: float | list[float] = -1.0,
        high: float | list[float] = 1.0,
    ) -> None:
        super().__init__()
        bounds = [torch.as_tensor(bound, dtype=torch.float32).expand(action_size) for bound in (low, high)]
        if not torch.stack(bounds).isfinite().all() or (bounds[0] >= bounds[1]).any():
            raise ValueError(f"low and high must be finite and low < high, got low={low}, high={high}")
        self.network = _mlp(observation_size, hidden_features, 2 * action_size, activation, "default", 1.0)
        self.register_buffer("shift", (bounds[0] + bounds[1]) / 2)
        self.register_buffer("scale", (bounds[1] - bounds[0]) / 2)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation before the tanh."""
        mean, log_std = self.network(observations).float().chunk(2, -1)
        return mean, log_std.clamp(*_LOG_STD_RANGE)


class TwinCritic(nn.Module):
    """Two independent state-action values, computed as one batched network.

    Args:
        observation_size: numbers in one observation, >= 1.
        action_size: numbers in one action, >= 1.
        hidden_features: width of each hidden layer.
        activation: name of a ``torch.nn`` activation class.

    Shape:
        ``(batch, observation_size)``, ``(batch, action_size)`` -> ``(2, batch)``.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden_features: Sequence[int] = (256, 256),
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        widths = [observation_size + action_size, *hidden_features, 1]
        pairs = [[nn.Linear(fan_in, fan_out) for _ in range(2)] for fan_in, fan_out in pairwise(widths)]
        self.weights = nn.ParameterList(torch.stack([layer.weight.detach().T for layer in pair]) for pair in pairs)
        self.biases = nn.ParameterList(torch.stack([layer.bias.detach()[None] for layer in pair]) for pair in pairs)
        self.activation = getattr(nn, activation)()

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Both values of each pair."""
        x = torch.cat([observations, actions], -1).expand(2, -1, -1)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = x if i == last else self.activation(x)
        return x.squeeze(-1).float()


class RunningMoments(nn.Module):
    """Mean and variance of everything seen, per coordinate, over all ranks.

    Args:
        shape: shape of one sample; ``()`` for scalars.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    inverse_std: Tensor

    def __init__(self, shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(tuple(shape), dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(tuple(shape), dtype=torch.float64))
        self.register_buffer("inverse_std", torch.ones(tuple(shape)))

    @torch.no_grad()
    def update(self, samples: Tensor) -> None:
        """Add samples ``(..., *shape)``; a collective call when there are several ranks."""
        x = samples.reshape(-1, *self.mean.shape).double() - self.mean
        sums = torch.stack([x.sum(0), x.square().sum(0), torch.full_like(self.mean, len(x))])
        first, second, number = all_reduce_sum(sums)
        self.count += number.flatten()[0]
        shift = first / self.count
        self.squares += second - self.count * shift.square()
        self.mean += shift
        self.inverse_std.copy_((self.squares.clamp(min=0) / self.count + 1e-8).rsqrt())

    def normalize(self, samples: Tensor, limit: float = 10.0) -> Tensor:
        """Subtract the mean, divide by the standard deviation, clip to ``[-limit, limit]``."""
        return ((samples - self.mean.float()) * self.inverse_std).clamp(-limit, limit)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over all ranks; ``x`` itself on a single one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def _mlp(
    in_features: int,
    hidden_features: Sequence[int],
    out_features: int,
    activation: str,
    initialization: Initialization,
    output_gain: float,
) -> nn.Sequential:
    widths = [in_features, *hidden_features, out_features]
    if min(widths) < 1:
        raise ValueError(f"widths must be >= 1, got {widths}")
    if initialization not in ("orthogonal", "default"):
        raise ValueError(f"initialization must be 'orthogonal' or 'default', got {initialization!r}")
    linear = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths)]
    if initialization == "orthogonal":
        for layer in linear:
            nn.init.orthogonal_(layer.weight, output_gain if layer is linear[-1] else 2**0.5)
            nn.init.zeros_(layer.bias)
    layers: list[nn.Module] = []
    for layer in linear[:-1]:
        layers += [layer, getattr(nn, activation)()]
    return nn.Sequential(*layers, linear[-1])
