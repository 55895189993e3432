"""Off-policy mirror descent policy optimisation (section 4.2 of the paper)."""

import copy
import math
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from lit_methods.batches import Spaces, TransitionBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.optim import MDPO
from lit_methods.rl.mdpo.agent import Agent, check_fraction, held
from lit_methods.rl.networks import SizedNetwork


class ActorStep(NamedTuple):
    """What an evaluation of the actor's loss leaves for the critics and for the log.

    Attributes:
        loss: scalar, with its graph.
        values: targets of the value network, ``(batch,)``.
        metrics: what is logged, if that was asked for.
    """

    loss: Tensor
    values: Tensor
    metrics: dict[str, Tensor]


class OffPolicyMDPO(Agent):
    r"""Off-policy MDPO (section 4.2 of the paper), with KL or Tsallis divergences; SAC is its limit t = 1/lambda.

    One batch is one update of each part, with actions :math:`\tilde a` drawn from the actor by reparameterisation:

    - actor: :math:`\frac1t\log\pi(\tilde a|s) - (\frac1t-\lambda)\log\pi_k(\tilde a|s) - Q_1(s,\tilde a)`, where
      :math:`\pi_k` is the actor as it was at the last renewal of the anchor, every ``anchor_interval`` updates;
    - critics: one step on :math:`\frac12 mse(Q_i, r + \gamma (1-terminated)\bar V(s'))` and
      :math:`\frac12 mse(V, \min_i Q_i(s,\tilde a) - \lambda\log\pi(\tilde a|s))`, with the same, older actions;
    - target: :math:`\bar V \leftarrow (1-\tau)\bar V + \tau V`.

    t and the anchor's interval are arguments of the optimizer, ``MDPO(params, step_size=t, inner_steps=1,
    anchor="parameters", anchor_interval=1000)``; with ``step_size = 1 / entropy_coef`` the anchor has no influence and
    the actor's loss is SAC's. With ``tsallis_q`` above 1 every logarithm is the Tsallis logarithm
    :math:`\log_q x = (x^{q-1}-1)/(q-1)` of the densities of single action dimensions, summed, and the anchor's term
    has a factor q: as in the authors' code. The same module learns from a data set (offline), which the paper does not.

    Logs ``train/return``, ``train/env_steps``, ``train/actor_loss``, ``train/critic_loss``, ``train/value``,
    ``train/entropy``, ``train/drift`` (mean of log π - log π_k), ``val/return``, ``test/return``.

    Args:
        actor: maps observations to mean and log standard deviation before a tanh, and has the buffers ``shift`` and
            ``scale`` of the actions' bounds: :class:`lit_methods.rl.networks.TanhGaussianActor`, which may leave sizes
            and bounds to the environment.
        critics: maps observations and actions in [-1, 1] to two values ``(2, batch)``:
            :class:`lit_methods.rl.networks.TwinCritic`.
        value: maps observations to values ``(batch,)``.
        entropy_coef: lambda, >= 0; 0 is the unregularised problem.
        tsallis_q: q, in [1, 2]; 1 is KL and Shannon entropy. The paper's best values are between 1 and 2.
        gamma: discount, in [0, 1].
        tau: rate of the target network, in (0, 1].
        action_reg: weight of the mean squares of the actor's two outputs, >= 0 (in the authors' code only).
        policy_q: the critic in the actor's loss: "q1" (paper) or "min" of both.
        exploration: what acts during training: "sample", or "mean" (the authors' code).
        optimizer: builds the actor's optimizer, an :class:`~lit_methods.optim.MDPO` with ``anchor="parameters"``.
        critic_optimizer: builds the one of critics and value together.

    Raises:
        ValueError: an argument out of range; in ``configure_model``, sizes or bounds that are not the environment's, or
            that nobody gives, and discrete actions.
        TypeError: in ``configure_optimizers``, if ``optimizer`` builds something else.
    """

    def __init__(
        self,
        actor: nn.Module,
        critics: nn.Module,
        value: nn.Module,
        entropy_coef: float = 0.2,
        tsallis_q: float = 1.0,
        gamma: float = 0.99,
        tau: float = 0.005,
        action_reg: float = 1e-3,
        policy_q: Literal["q1", "min"] = "q1",
        exploration: Literal["sample", "mean"] = "sample",
        optimizer: OptimizerCallable = lambda params: MDPO(
            params, lr=3e-4, inner_steps=1, anchor="parameters", anchor_interval=1000, max_grad_norm=None, fused=True
        ),
        critic_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=3e-4, fused=True),
    ) -> None:
        super().__init__()
        check_fraction("gamma", gamma)
        if not 0 < tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {tau}")
        if not 1 <= tsallis_q <= 2:
            raise ValueError(f"tsallis_q must be in [1, 2], got {tsallis_q}")
        for name, weight in (("entropy_coef", entropy_coef), ("action_reg", action_reg)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} must be >= 0 and finite, got {weight}")
        if policy_q not in ("q1", "min"):
            raise ValueError(f"policy_q must be 'q1' or 'min', got {policy_q!r}")
        if exploration not in ("sample", "mean"):
            raise ValueError(f"exploration must be 'sample' or 'mean', got {exploration!r}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.actor = actor
        self.critics = critics
        self.value = value
        self.target_value = copy.deepcopy(value).requires_grad_(False)
        self.entropy_coef = entropy_coef
        self.tsallis_q = tsallis_q
        self.gamma = gamma
        self.tau = tau
        self.action_reg = action_reg
        self.policy_q = policy_q
        self.exploration = exploration
        self.optimizer = optimizer
        self.critic_optimizer = critic_optimizer
        self._anchor: tuple[nn.Module, ...] = ()  # in a tuple it is no submodule, whose parameters would be saved
        self._moving: tuple[list[Tensor], list[Tensor]] = [], []

    def parts(self) -> dict[str, nn.Module]:
        """Actor, critics and value."""
        return {"actor": self.actor, "critics": self.critics, "value": self.value}

    def fit_to(self, spaces: Spaces) -> None:
        """Fit the networks to an environment or a data set."""
        if spaces.num_actions:
            raise ValueError("OffPolicyMDPO must get continuous actions, but these are discrete: use OnPolicyMDPO")
        unbuilt = isinstance(self.value, SizedNetwork) and not self.value.is_built
        super().fit_to(spaces)
        if unbuilt:
            self.target_value = copy.deepcopy(self.value).requires_grad_(False)

    def forward(self, observations: Tensor) -> Tensor:
        """Actions at the mean of the actor, in the environment's units."""
        return self._to_environment(self.actor(observations)[0].tanh())

    @torch.no_grad()
    def act(self, observations: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Actions for observations ``(N, observation)``, in the environment's units, and their log-densities."""
        mean, log_std = self.actor(observations)
        still = deterministic or self.exploration == "mean"
        noise = torch.zeros_like(mean) if still else torch.randn_like(mean)
        pre_tanh = mean + log_std.exp() * noise
        log_probs = normal_log_prob(noise, log_std) - log_tanh_derivative(pre_tanh)
        return self._to_environment(pre_tanh.tanh()), log_probs.sum(-1)

    def training_step(self, batch: TransitionBatch, batch_idx: int) -> None:
        """One update of actor, critics and target."""
        wrapper, critic_wrapper = self._wrapped_optimizers()
        optimizer: Any = wrapper.optimizer
        actor_parameters, critic_parameters = held(optimizer), held(critic_wrapper.optimizer)
        log = self._logs_at(self.trainer.global_step + 1)
        steps: list[ActorStep] = []

        def closure() -> Tensor:
            inverse_t = 1 / optimizer.param_groups[0]["step_size"]
            steps.append(self.actor_loss(batch.observations, self._anchor[0], inverse_t, log))
            self._differentiate(steps[-1].loss, actor_parameters)
            return steps[-1].loss

        actor_loss = wrapper.step(closure)
        step = steps[-1]
        critic_loss = self.critic_loss(batch, step.values)
        self._differentiate(critic_loss, critic_parameters)
        critic_wrapper.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(*self._moving, self.tau)
        metrics = {"actor_loss": actor_loss, **step.metrics, "critic_loss": critic_loss.detach()}
        self._log_training(metrics, batch.episode_returns, batch.env_steps)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Actions at the actor's mean for a batch of observations ``(batch, observation)``."""
        return self(batch[0] if isinstance(batch, tuple | list) else batch)

    def configure_optimizers(self) -> Any:
        """The actor's optimizer and that of critics and value."""
        optimizer = self.optimizer(self.actor.parameters())
        if not isinstance(optimizer, MDPO) or optimizer.param_groups[0]["anchor"] != "parameters":
            raise TypeError("optimizer must build a lit_methods.optim.MDPO with anchor='parameters'")
        return optimizer, self.critic_optimizer([*self.critics.parameters(), *self.value.parameters()])

    @property
    def _bounds(self) -> tuple[Tensor, Tensor]:
        return self.actor.shift, self.actor.scale  # type: ignore[return-value]

    def _to_environment(self, actions: Tensor) -> Tensor:
        shift, scale = self._bounds
        return shift + scale * actions

    def on_train_start(self) -> None:
        """Build an actor from the anchor's parameters, which the optimizer renews in place."""
        super().on_train_start()
        optimizer: Any = self._wrapped_optimizers()[0].optimizer
        anchor = copy.deepcopy(self.actor).requires_grad_(False)
        for name, value in optimizer.anchor_parameters(self.actor).items():
            anchor.get_parameter(name).data = value
        self._anchor = (anchor,)
        self._moving = list(self.target_value.parameters()), list(self.value.parameters())

    def actor_loss(self, observations: Tensor, anchor: nn.Module, inverse_t: float, log: bool = True) -> ActorStep:
        """The actor's loss for fresh actions, and what else they are good for.

        Args:
            observations: ``(N, observation)``.
            anchor: old actor, from which the divergence is measured.
            inverse_t: ``1 / t_k``, the weight of that divergence, > 0.
            log: whether to compute the metrics too.
        """
        mean, log_std = self.actor(observations)
        noise = torch.randn_like(mean)
        pre_tanh = mean + log_std.exp() * noise
        log_derivative = log_tanh_derivative(pre_tanh)
        log_prob = normal_log_prob(noise, log_std) - log_derivative
        log_q = tsallis_log(log_prob, self.tsallis_q).sum(-1)
        values = self.critics(observations, pre_tanh.tanh())
        chosen = values[0] if self.policy_q == "q1" else values.amin(0)
        loss = (inverse_t * log_q - chosen).mean()
        anchor_weight = self.tsallis_q * (inverse_t - self.entropy_coef)
        if anchor_weight or log:
            old_mean, old_log_std = anchor(observations)
            old_log_prob = normal_log_prob((pre_tanh - old_mean) * (-old_log_std).exp(), old_log_std) - log_derivative
            if anchor_weight:
                loss = loss - anchor_weight * tsallis_log(old_log_prob, self.tsallis_q).sum(-1).mean()
        if self.action_reg:
            loss = loss + self.action_reg * (mean.square().mean() + log_std.square().mean())
        metrics = {}
        with torch.no_grad():
            targets = values.amin(0) - self.entropy_coef * log_q
            if log:
                drift = (log_prob - old_log_prob).sum(-1).mean()
                metrics = {"entropy": -log_prob.sum(-1).mean(), "drift": drift, "value": targets.mean()}
        return ActorStep(loss, targets, metrics)

    def critic_loss(self, batch: TransitionBatch, values: Tensor) -> Tensor:
        """Half the squared errors of both critics and of the value, which follows ``values``, ``(N,)``."""
        with torch.no_grad():
            following = self.target_value(batch.next_observations)
            target = batch.rewards + self.gamma * (1 - batch.terminations) * following
            actions = (batch.actions - self._bounds[0]) / self._bounds[1]
        estimates = self.critics(batch.observations, actions)
        critic_loss = 0.5 * (estimates - target).square().mean(-1).sum()
        return critic_loss + 0.5 * mse_loss(self.value(batch.observations), values)


def normal_log_prob(noise: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of ``mean + exp(log_std) * noise`` under the normal distribution of that mean and deviation."""
    return -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)


def log_tanh_derivative(x: Tensor) -> Tensor:
    """``log(1 - tanh(x)^2)``, accurate also where tanh is 1 in floating point."""
    return 2 * (math.log(2) - x - softplus(-2 * x))


def tsallis_log(log_density: Tensor, q: float) -> Tensor:
    """``(x^(q-1) - 1) / (q-1)`` of densities given by their logarithm; the logarithm itself for q = 1.

    For q > 1 densities count as at least 1e-6, and powers as at most 1e8.
    """
    if q == 1:
        return log_density
    bounded = log_density.clamp(math.log(1e-6), 8 * math.log(10) / (q - 1))
    return torch.expm1((q - 1) * bounded) / (q - 1)
