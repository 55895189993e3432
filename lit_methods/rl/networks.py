"""The networks of the reinforcement-learning recipes, and running moments to normalise what they see.

Sizes and bounds may be left out: the modules of :mod:`lit_methods.rl` take them from the environment or data set (and
refuse given ones that differ from it).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils.hooks import RemovableHandle

from lit_methods.batches import Spaces
from lit_methods.optim.foundation.ranks import world_size

Initialization = Literal["orthogonal", "default"]
_LOG_STD_RANGE = (-20.0, 2.0)


class SizedNetwork(nn.Module):
    """Base of networks whose sizes may be left out until they are fitted to an environment or a data set.

    A subclass gives its sizes to :meth:`_set_sizes` and makes its layers in :meth:`_build`.
    """

    sizes: dict[str, int | None]
    _build: Callable[..., None]
    _waits: RemovableHandle

    @property
    def is_built(self) -> bool:
        """Whether all sizes are known."""
        return None not in self.sizes.values()

    def fit_to(self, spaces: Spaces) -> None:
        """Take the sizes that were left out, and make the layers.

        Raises:
            ValueError: a size that was given is another; or observations or actions are of another kind.
        """
        name = type(self).__name__
        if len(spaces.observation_shape) != 1:
            raise ValueError(
                f"{name} takes observations of one dimension, got shape {spaces.observation_shape}: flatten them (with "
                "gymnasium.wrappers.FlattenObservation), or use a network of your own"
            )
        found = {"observation_size": spaces.observation_shape[0]}
        found |= {"num_actions": spaces.num_actions} if spaces.num_actions else {"action_size": len(spaces.low)}
        for size, given in self.sizes.items():
            if size not in found:
                kinds = ("discrete", "continuous") if spaces.num_actions else ("continuous", "discrete")
                raise ValueError(f"{name} must get {kinds[1]} actions, but these are {kinds[0]}")
            if given is not None and given != found[size]:
                raise ValueError(
                    f"{size} of {name} must be {found[size]}, as the environment or data has it, got {given}"
                )
        if not self.is_built:
            self._set_sizes(**{size: found[size] for size in self.sizes})

    def _set_sizes(self, **sizes: int | None) -> None:
        self.sizes = sizes
        if self.is_built:
            if hasattr(self, "_waits"):
                self._waits.remove()
            self._build(**sizes)
        else:
            self._waits = self.register_forward_pre_hook(_refuse_unbuilt)


def _refuse_unbuilt(module: nn.Module, inputs: object) -> None:
    missing = [size for size, value in module.sizes.items() if value is None]  # type: ignore[union-attr, operator]
    raise RuntimeError(f"{type(module).__name__} has no layers before a Trainer has seen the data: give {missing}")


class GaussianPolicy(SizedNetwork):
    """Diagonal Gaussian policy; its standard deviations do not depend on the observation.

    Args:
        observation_size: numbers in one observation, >= 1; None: as the environment or data has it.
        action_size: numbers in one action, >= 1; None: likewise.
        hidden_features: width of each hidden layer.
        activation: name of a ``torch.nn`` activation class.
        initialization: "orthogonal" (gain sqrt(2), 0.01 for the means, zero biases) or torch's "default".
        log_std: initial logarithm of the standard deviations.

    Shape:
        ``(..., observation_size)`` -> distribution of ``(..., action_size)``.
    """

    def __init__(
        self,
        observation_size: int | None = None,
        action_size: int | None = None,
        hidden_features: Sequence[int] = (64, 64),
        activation: str = "Tanh",
        initialization: Initialization = "orthogonal",
        log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.settings = _check_settings(hidden_features, activation, initialization)
        self.initial_log_std = log_std
        self._set_sizes(observation_size=observation_size, action_size=action_size)

    def _build(self, observation_size: int, action_size: int) -> None:
        self.mean = _mlp(observation_size, action_size, *self.settings, 0.01)
        self.log_std = nn.Parameter(torch.full((action_size,), self.initial_log_std))

    def forward(self, observations: Tensor) -> Independent:
        """Distribution of the actions."""
        mean = self.mean(observations).float()
        return Independent(Normal(mean, self.log_std.exp().expand_as(mean), validate_args=False), 1)


class CategoricalPolicy(SizedNetwork):
    """Policy over a finite number of actions.

    Args:
        observation_size: numbers in one observation, >= 1; None: as the environment or data has it.
        num_actions: number of actions, >= 2; None: likewise.
        hidden_features: width of each hidden layer.
        activation: name of a ``torch.nn`` activation class.
        initialization: "orthogonal" (gain sqrt(2), 0.01 for the means, zero biases) or torch's "default".

    Shape:
        ``(..., observation_size)`` -> distribution of ``(...)`` int64 actions.
    """

    def __init__(
        self,
        observation_size: int | None = None,
        num_actions: int | None = None,
        hidden_features: Sequence[int] = (64, 64),
        activation: str = "Tanh",
        initialization: Initialization = "orthogonal",
    ) -> None:
        super().__init__()
        self.settings = _check_settings(hidden_features, activation, initialization)
        self._set_sizes(observation_size=observation_size, num_actions=num_actions)

    def _build(self, observation_size: int, num_actions: int) -> None:
        self.logits = _mlp(observation_size, num_actions, *self.settings, 0.01)

    def forward(self, observations: Tensor) -> Categorical:
        """Distribution of the actions."""
        return Categorical(logits=self.logits(observations).float(), validate_args=False)


class ValueNetwork(SizedNetwork):
    """State value.

    Args:
        observation_size: numbers in one observation, >= 1; None: as the environment or data has it.
        hidden_features: width of each hidden layer.
        activation: name of a ``torch.nn`` activation class.
        initialization: "orthogonal" (gain sqrt(2), 1 for the output, zero biases) or torch's "default".

    Shape:
        ``(..., observation_size)`` -> ``(...)``.
    """

    def __init__(
        self,
        observation_size: int | None = None,
        hidden_features: Sequence[int] = (64, 64),
        activation: str = "Tanh",
        initialization: Initialization = "orthogonal",
    ) -> None:
        super().__init__()
        self.settings = _check_settings(hidden_features, activation, initialization)
        self._set_sizes(observation_size=observation_size)

    def _build(self, observation_size: int) -> None:
        self.value = _mlp(observation_size, 1, *self.settings, 1.0)

    def forward(self, observations: Tensor) -> Tensor:
        """Value of each observation."""
        return self.value(observations).squeeze(-1).float()


class TanhGaussianActor(SizedNetwork):
    """Gaussian whose samples a tanh brings into (-1, 1), for off-policy methods; both moments are learned.

    Args:
        observation_size: numbers in one observation, >= 1; None: as the environment or data has it.
        action_size: numbers in one action, >= 1; None: likewise.
        hidden_features: width of each hidden layer.
        activation: name of a ``torch.nn`` activation class.
        low: smallest value of each action in the environment's units; one number, or one per action; None: the
            environment's, and -1 until one is seen.
        high: largest value of each action; None: the environment's, and 1 until one is seen.

    Shape:
        ``(..., observation_size)`` -> mean and log standard deviation, before the tanh, of ``(..., action_size)`` each.

    Raises:
        ValueError: only one of the bounds is given, or they are infinite or not in order.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        observation_size: int | None = None,
        action_size: int | None = None,
        hidden_features: Sequence[int] = (256, 256),
        activation: str = "ReLU",
        low: float | list[float] | None = None,
        high: float | list[float] | None = None,
    ) -> None:
        super().__init__()
        self.settings = _check_settings(hidden_features, activation, "default")
        if (low is None) != (high is None):
            raise ValueError(f"low and high must both be given, or neither, got low={low}, high={high}")
        if low is not None and high is not None:
            bounds = torch.as_tensor(low), torch.as_tensor(high)
            if not all(bound.isfinite().all() for bound in bounds) or (bounds[0] >= bounds[1]).any():
                raise ValueError(f"low and high must be finite and low < high, got low={low}, high={high}")
        self.low, self.high = low, high
        self._set_sizes(observation_size=observation_size, action_size=action_size)

    def _build(self, observation_size: int, action_size: int) -> None:
        self.network = _mlp(observation_size, 2 * action_size, *self.settings, 1.0)
        low, high = (-1.0, 1.0) if self.low is None else (self.low, self.high)
        bounds = [torch.as_tensor(bound, dtype=torch.float32).expand(action_size) for bound in (low, high)]
        self.register_buffer("shift", (bounds[0] + bounds[1]) / 2)
        self.register_buffer("scale", (bounds[1] - bounds[0]) / 2)

    def fit_to(self, spaces: Spaces) -> None:
        """Take the sizes and bounds that were left out.

        Raises:
            ValueError: a size or bound that was given is another, or the environment has no finite bounds.
        """
        super().fit_to(spaces)
        low, high = torch.tensor(spaces.low), torch.tensor(spaces.high)
        found = f"{spaces.low} and {spaces.high}"
        if self.low is None:
            if spaces.observed:
                raise ValueError(f"low and high must be given, or eval_env: recorded actions ({found}) tell no bounds")
            if not (low.isfinite().all() and high.isfinite().all()):
                raise ValueError(f"low and high must be given: those of the environment are not finite, but {found}")
            self.shift.copy_((low + high) / 2)
            self.scale.copy_((high - low) / 2)
            return
        margin = 1e-5 * self.scale.cpu()
        below, above = low - (self.shift - self.scale).cpu(), (self.shift + self.scale).cpu() - high
        if spaces.observed:
            if (below < -margin).any() or (above < -margin).any():
                raise ValueError(
                    f"low and high must contain the recorded actions, {found}, got {self.low} and {self.high}"
                )
        elif (below.abs() > margin).any() or (above.abs() > margin).any():
            raise ValueError(f"low and high must be the environment's, {found}, got {self.low} and {self.high}")

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation before the tanh."""
        mean, log_std = self.network(observations).float().chunk(2, -1)
        return mean, log_std.clamp(*_LOG_STD_RANGE)


class TwinCritic(SizedNetwork):
    """Two independent state-action values, computed as one batched network.

    Args:
        observation_size: numbers in one observation, >= 1; None: as the environment or data has it.
        action_size: numbers in one action, >= 1; None: likewise.
        hidden_features: width of each hidden layer.
        activation: name of a ``torch.nn`` activation class.

    Shape:
        ``(batch, observation_size)``, ``(batch, action_size)`` -> ``(2, batch)``.
    """

    def __init__(
        self,
        observation_size: int | None = None,
        action_size: int | None = None,
        hidden_features: Sequence[int] = (256, 256),
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        self.settings = _check_settings(hidden_features, activation, "default")
        self._set_sizes(observation_size=observation_size, action_size=action_size)

    def _build(self, observation_size: int, action_size: int) -> None:
        hidden_features, activation, _ = self.settings
        widths = [observation_size + action_size, *hidden_features, 1]
        _check_widths(widths)
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
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


Settings = tuple[Sequence[int], str, Initialization]


def _check_settings(hidden_features: Sequence[int], activation: str, initialization: Initialization) -> Settings:
    _check_widths(hidden_features)
    if initialization not in ("orthogonal", "default"):
        raise ValueError(f"initialization must be 'orthogonal' or 'default', got {initialization!r}")
    return hidden_features, activation, initialization


def _check_widths(widths: Sequence[int]) -> None:
    if min(widths, default=1) < 1:
        raise ValueError(f"widths must be >= 1, got {widths}")


def _mlp(
    in_features: int,
    out_features: int,
    hidden_features: Sequence[int],
    activation: str,
    initialization: Initialization,
    output_gain: float,
) -> nn.Sequential:
    widths = [in_features, *hidden_features, out_features]
    _check_widths(widths)
    linear = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths)]
    if initialization == "orthogonal":
        for layer in linear:
            nn.init.orthogonal_(layer.weight, output_gain if layer is linear[-1] else 2**0.5)
            nn.init.zeros_(layer.bias)
    layers: list[nn.Module] = []
    for layer in linear[:-1]:
        layers += [layer, getattr(nn, activation)()]
    return nn.Sequential(*layers, linear[-1])
