"""Mirror descent policy optimisation, on-policy and off-policy.

Tomar, Shani, Efroni, Ghavamzadeh, "Mirror Descent Policy Optimization", ICLR 2022, arXiv 2005.09814. Both modules take
proximal policy steps with :class:`lit_methods.optim.MDPO`; any datamodule whose batches are
:class:`~lit_methods.batches.RolloutBatch` or :class:`~lit_methods.batches.TransitionBatch` feeds them. Where the
authors' code and their paper differ, the docstrings say which one this follows.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.optim import Optimizer

from lit_methods.batches import EpisodeBatch, RolloutBatch, TransitionBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.lr_find import refuse_lr_finder
from lit_methods.optim import MDPO, MDPOStepSize
from lit_methods.precision import load_unrounded
from lit_methods.rl.networks import RunningMoments, all_reduce_sum

__all__ = ["OffPolicyMDPO", "OnPolicyMDPO"]

_WINDOW = 40  # training episodes in the logged mean return


class _Agent(LightningModule):
    """What both modules share: evaluation, the logged returns, and gradients that all ranks agree on."""

    recent_returns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        self.automatic_optimization = False
        self.register_buffer("recent_returns", torch.full((_WINDOW,), math.nan))

    def on_train_start(self) -> None:
        """Refuse Lightning's search for a learning rate."""
        refuse_lr_finder(self)

    def validation_step(self, batch: EpisodeBatch, batch_idx: int) -> None:
        """Log the mean return of evaluation episodes."""
        self._log_episodes(batch, "val")

    def test_step(self, batch: EpisodeBatch, batch_idx: int) -> None:
        """Log the mean return of evaluation episodes."""
        self._log_episodes(batch, "test")

    def _log_episodes(self, batch: EpisodeBatch, stage: str) -> None:
        means = {f"{stage}/return": batch.returns.mean(), f"{stage}/episode_length": batch.lengths.float().mean()}
        self.log_dict(means, sync_dist=True, batch_size=len(batch.returns))

    def _log_training(self, metrics: dict[str, Tensor], returns: Tensor, env_steps: Tensor) -> None:
        """Log ``metrics``, the mean return of the last training episodes, and the environment steps of all ranks.

        Every ``log_every_n_steps`` of the Trainer and in the last batch of an epoch.
        """
        if len(returns):
            self.recent_returns = torch.cat([self.recent_returns, returns.to(self.recent_returns)])[-_WINDOW:]
        if not self._logs_at(self.trainer.global_step):
            return  # off-policy, logging at every step would take longer than the step
        steps = env_steps.to(self.device, torch.float32) * self.trainer.world_size
        values = {**metrics, "return": self.recent_returns.nanmean(), "env_steps": steps}
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)

    def _logs_at(self, step: int) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.trainer.is_last_batch or (every > 0 and step % every == 0)

    def _wrapped_optimizers(self) -> list[LightningOptimizer]:
        return self.optimizers()  # type: ignore[return-value]

    def _differentiate(self, loss: Tensor, parameters: list[nn.Parameter], retain_graph: bool = False) -> None:
        """Write the gradient into ``.grad``, averaged over ranks.

        Policy and critic have separate backward passes, which DistributedDataParallel's own averaging does not expect.
        """
        gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([_or_zeros(g, p).flatten() for g, p in zip(gradients, parameters, strict=True)])
            dist.all_reduce(flat)
            parts = (flat / dist.get_world_size()).split([p.numel() for p in parameters])
            gradients = tuple(part.view_as(p) for part, p in zip(parts, parameters, strict=True))
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g


class OnPolicyMDPO(_Agent):
    r"""On-policy MDPO (section 4.1 of the paper).

    One batch is one iteration:

    1. advantages by generalised advantage estimation from the current critic, standardised over all ranks' rollouts;
    2. the policy's optimizer takes ``inner_steps`` full-batch steps on
       :math:`-\frac1n\sum_i \frac{\pi(a_i|s_i)}{\pi_k(a_i|s_i)} \hat A_i + \frac{1}{t_k} KL(\pi, \pi_k)`;
    3. ``critic_epochs`` epochs of mini-batches on the value loss, clipped around the old values;
    4. t_k is annealed.

    Time limits bootstrap from the value of the final observation (the authors' code treats them as terminations).
    Observations are normalised by the moments of all earlier rollouts, so that the log-probabilities in the batch are
    those of the policy as it enters ``training_step``; rewards are divided by the standard deviation of the discounted
    return. ``training_step`` counts as one step of the Trainer, whatever the critic does in it.

    Logs ``train/return`` (undiscounted, mean of the last 40 training episodes of each rank), ``train/env_steps``,
    ``train/kl``, ``train/policy_loss``, ``train/value_loss``, ``train/step_size``, ``val/return``, ``test/return``.

    Args:
        policy: maps normalised observations ``(..., *observation)`` to a torch distribution of actions whose parameters
            :class:`~lit_methods.optim.MDPO` knows, such as :class:`lit_methods.rl.networks.GaussianPolicy`.
        critic: maps normalised observations to values ``(...)``.
        observation_shape: shape of one observation; a number means one dimension.
        gamma: discount, in [0, 1].
        gae_lambda: weight of longer estimates of the advantage, in [0, 1].
        critic_epochs: passes over the rollout for the critic, >= 1.
        critic_batch_size: steps per mini-batch of the critic, >= 1; what is left over is dropped.
        value_clip: largest change of a value that the critic's loss rewards, > 0; None: no clipping.
        normalize_advantages: standardise the advantages.
        normalize_observations: see above.
        normalize_rewards: see above; the bounds of both are ±10.
        bootstrap_truncated: let the value of the final observation follow a truncation.
        step_size_schedule: of t_k, which starts from the optimizer's ``step_size``: "linear" to 0 over
            ``total_iterations``, "constant" or "inverse_sqrt".
        total_iterations: K of the linear schedule, >= 1; None: as many as the Trainer will run.
        optimizer: builds the policy's optimizer, which must be an :class:`~lit_methods.optim.MDPO`.
        critic_optimizer: builds the critic's.
        lr_scheduler: builds a learning rate schedule for each of the two, stepped every iteration.

    Raises:
        ValueError: an argument out of range.
        TypeError: in ``configure_optimizers``, if ``optimizer`` builds something else than an MDPO.
    """

    def __init__(
        self,
        policy: nn.Module,
        critic: nn.Module,
        observation_shape: int | tuple[int, ...],
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        critic_epochs: int = 5,
        critic_batch_size: int = 128,
        value_clip: float | None = 0.2,
        normalize_advantages: bool = True,
        normalize_observations: bool = True,
        normalize_rewards: bool = True,
        bootstrap_truncated: bool = True,
        step_size_schedule: Literal["linear", "constant", "inverse_sqrt"] = "linear",
        total_iterations: int | None = None,
        optimizer: OptimizerCallable = lambda params: MDPO(params, lr=3e-4),
        critic_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=3e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
            _check_fraction(name, value)
        for name, count in (
            ("critic_epochs", critic_epochs),
            ("critic_batch_size", critic_batch_size),
            ("total_iterations", total_iterations),
        ):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        if value_clip is not None and not value_clip > 0:
            raise ValueError(f"value_clip must be > 0 or None, got {value_clip}")
        if step_size_schedule not in ("linear", "constant", "inverse_sqrt"):
            raise ValueError(
                f"step_size_schedule must be 'linear', 'constant' or 'inverse_sqrt', got {step_size_schedule!r}"
            )
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.policy = policy
        self.critic = critic
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.critic_epochs = critic_epochs
        self.critic_batch_size = critic_batch_size
        self.value_clip = value_clip
        self.normalize_advantages = normalize_advantages
        self.normalize_observations = normalize_observations
        self.normalize_rewards = normalize_rewards
        self.bootstrap_truncated = bootstrap_truncated
        self.step_size_schedule: Literal["linear", "constant", "inverse_sqrt"] = step_size_schedule
        self.total_iterations = total_iterations
        self.optimizer = optimizer
        self.critic_optimizer = critic_optimizer
        self.lr_scheduler = lr_scheduler
        shape = (observation_shape,) if isinstance(observation_shape, int) else tuple(observation_shape)
        self.observation_moments = RunningMoments(shape)
        self.return_moments = RunningMoments()
        self._discounted: Tensor | None = None  # running discounted return of each environment of this rank

    def forward(self, observations: Tensor) -> Tensor:
        """Most likely actions for raw observations ``(..., *observation)``."""
        return self.policy(self._normalize(observations)).mode

    @torch.no_grad()
    def act(self, observations: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Actions for raw observations ``(N, *observation)``, and their log-densities ``(N,)``."""
        policy = self.policy(self._normalize(observations))
        actions = policy.mode if deterministic else policy.sample()
        return actions, policy.log_prob(actions)

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        """One iteration."""
        observations = self._normalize(batch.observations)
        rewards = self._scale_rewards(batch) if self.normalize_rewards else batch.rewards
        values, next_values = self._values(observations, batch)
        truncations = batch.truncations if self.bootstrap_truncated else torch.zeros_like(batch.truncations)
        terminations = batch.terminations + batch.truncations - truncations
        advantages = generalized_advantages(
            rewards, values, next_values, terminations, truncations, self.gamma, self.gae_lambda
        )
        returns = (advantages + values).flatten()
        metrics = self._update_policy(observations, batch, self._standardize(advantages))
        metrics["value_loss"] = self._update_critic(observations.flatten(0, 1), values.flatten(), returns)
        for scheduler in self._schedulers():
            scheduler.step()
        if self.normalize_observations:
            self.observation_moments.update(batch.observations)
        self._log_training(metrics, batch.episode_returns, batch.env_steps)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Most likely actions for a batch of raw observations ``(batch, *observation)``."""
        return self(batch[0] if isinstance(batch, tuple | list) else batch)

    def configure_optimizers(self) -> Any:
        """Policy's and critic's optimizers, the schedule of t_k, and those of the learning rates."""
        optimizers = [
            build(p for p in part.parameters() if p.requires_grad)
            for build, part in ((self.optimizer, self.policy), (self.critic_optimizer, self.critic))
        ]
        if not isinstance(optimizers[0], MDPO):
            raise TypeError(f"optimizer must build a lit_methods.optim.MDPO, got {type(optimizers[0]).__name__}")
        total = self.total_iterations
        if total is None and self.step_size_schedule == "linear":
            steps = self.trainer.estimated_stepping_batches
            if not math.isfinite(steps):
                raise ValueError("total_iterations must be given when the Trainer has neither max_epochs nor max_steps")
            total = int(steps)
        schedulers: list[Any] = [MDPOStepSize(optimizers[0], self.step_size_schedule, total)]
        if self.lr_scheduler is not None:
            schedulers += [self.lr_scheduler(optimizer) for optimizer in optimizers]
        return optimizers, schedulers

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep every rank's running discounted returns."""
        if self._discounted is not None:
            checkpoint["discounted_returns"] = _gather_ranks(self._discounted)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this rank's running discounted returns."""
        saved = checkpoint.get("discounted_returns")
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._discounted = saved[rank] if saved is not None and rank < len(saved) else None

    def _normalize(self, observations: Tensor) -> Tensor:
        return self.observation_moments.normalize(observations) if self.normalize_observations else observations

    def _scale_rewards(self, batch: RolloutBatch) -> Tensor:
        """Rewards over the standard deviation of the discounted return so far."""
        rewards = batch.rewards.cpu().numpy()
        goes_on = 1 - torch.maximum(batch.terminations, batch.truncations).cpu().numpy()
        running = np.zeros(rewards.shape[1], np.float32) if self._discounted is None else self._discounted.numpy()
        returns = np.empty_like(rewards)
        for t, reward in enumerate(rewards):
            returns[t] = running = running * self.gamma + reward
            running = running * goes_on[t]
        self._discounted = torch.from_numpy(running)
        self.return_moments.update(torch.from_numpy(returns).to(self.device))
        return (batch.rewards * self.return_moments.inverse_std).clamp(-10, 10)

    @torch.no_grad()
    def _values(self, observations: Tensor, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Values of the observations and of what truly followed them, ``(T, N)`` each."""
        ended = torch.maximum(batch.terminations, batch.truncations).bool()
        ended[-1] = True  # what follows these is not the next row
        last = self.critic(self._normalize(batch.next_observations[ended]))
        values = self.critic(observations)
        following = values.roll(-1, 0)
        following[ended] = last.to(values.dtype)
        return values, following

    def _standardize(self, advantages: Tensor) -> Tensor:
        if not self.normalize_advantages:
            return advantages
        x = advantages.double()
        total, number = all_reduce_sum(torch.stack([x.sum(), x.new_tensor(x.numel())]))
        centred = x - total / number
        std = (all_reduce_sum(centred.square().sum()) / number).sqrt()
        return (centred / (std + 1e-8)).to(advantages.dtype)

    def _update_policy(self, observations: Tensor, batch: RolloutBatch, advantages: Tensor) -> dict[str, Tensor]:
        wrapper = self._wrapped_optimizers()[0]
        optimizer: Any = wrapper.optimizer
        parameters = _held(optimizer)
        losses: list[Tensor] = []

        def closure() -> Tensor:
            policy = self.policy(observations)
            ratio = (policy.log_prob(batch.actions) - batch.log_probs).exp()
            loss = -(ratio * advantages).mean() + optimizer.proximity(policy)
            self._differentiate(loss, parameters)
            losses.append(loss.detach())
            return loss

        step_size = torch.tensor(optimizer.param_groups[0]["step_size"])
        wrapper.step(closure)
        return {"policy_loss": losses[-1], "kl": optimizer.divergence, "step_size": step_size}

    def _update_critic(self, observations: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
        optimizer = self._wrapped_optimizers()[1].optimizer  # bare: its steps are none of the Trainer's
        parameters = _held(optimizer)
        size = min(self.critic_batch_size, len(returns))
        total, number = torch.zeros((), device=self.device), 0
        for _ in range(self.critic_epochs):
            order = torch.randperm(len(returns)).to(returns.device)
            for rows in order[: len(order) // size * size].split(size):
                values, target = self.critic(observations[rows]), returns[rows]
                loss = (values - target).square()
                if self.value_clip is not None:
                    old = old_values[rows]
                    clipped = old + (values - old).clamp(-self.value_clip, self.value_clip)
                    loss = torch.maximum(loss, (clipped - target).square())
                self._differentiate(loss.mean(), parameters)
                optimizer.step()
                total += loss.detach().mean()
                number += 1
        return total / number

    def _schedulers(self) -> Iterable[Any]:
        schedulers = self.lr_schedulers()
        return schedulers if isinstance(schedulers, list) else [schedulers]


class OffPolicyMDPO(_Agent):
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
            ``scale`` of the actions' bounds: :class:`lit_methods.rl.networks.TanhGaussianActor`.
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
        ValueError: an argument out of range.
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
        _check_fraction("gamma", gamma)
        if not 0 < tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {tau}")
        if not 1 <= tsallis_q <= 2:
            raise ValueError(f"tsallis_q must be in [1, 2], got {tsallis_q}")
        for name, weight in (("entropy_coef", entropy_coef), ("action_reg", action_reg)):
            if not weight >= 0:
                raise ValueError(f"{name} must be >= 0, got {weight}")
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
        actor_parameters, critic_parameters = _held(optimizer), _held(critic_wrapper.optimizer)
        found: dict[str, Tensor] = {}
        log = self._logs_at(self.trainer.global_step + 1)

        def closure() -> Tensor:
            loss = self._actor_loss(batch.observations, 1 / optimizer.param_groups[0]["step_size"], found, log)
            self._differentiate(loss, actor_parameters)
            return loss

        found["actor_loss"] = wrapper.step(closure)
        critic_loss = self._critic_loss(batch, found.pop("values"))
        self._differentiate(critic_loss, critic_parameters)
        critic_wrapper.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(*self._moving, self.tau)
        self._log_training({**found, "critic_loss": critic_loss.detach()}, batch.episode_returns, batch.env_steps)

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

    def _actor_loss(self, observations: Tensor, inverse_t: float, found: dict[str, Tensor], log: bool = True) -> Tensor:
        """Loss of the actor; leaves in ``found`` the targets of the value network and, if asked, what is logged."""
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
            old_mean, old_log_std = self._anchor[0](observations)
            old_log_prob = normal_log_prob((pre_tanh - old_mean) * (-old_log_std).exp(), old_log_std) - log_derivative
            if anchor_weight:
                loss = loss - anchor_weight * tsallis_log(old_log_prob, self.tsallis_q).sum(-1).mean()
        if self.action_reg:
            loss = loss + self.action_reg * (mean.square().mean() + log_std.square().mean())
        with torch.no_grad():
            found["values"] = values.amin(0) - self.entropy_coef * log_q
            if log:
                found["entropy"] = -log_prob.sum(-1).mean()
                found["drift"] = (log_prob - old_log_prob).sum(-1).mean()
                found["value"] = found["values"].mean()
        return loss

    def _critic_loss(self, batch: TransitionBatch, values: Tensor) -> Tensor:
        with torch.no_grad():
            following = self.target_value(batch.next_observations)
            target = batch.rewards + self.gamma * (1 - batch.terminations) * following
            actions = (batch.actions - self._bounds[0]) / self._bounds[1]
        estimates = self.critics(batch.observations, actions)
        critic_loss = 0.5 * (estimates - target).square().mean(-1).sum()
        return critic_loss + 0.5 * mse_loss(self.value(batch.observations), values)


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    truncations: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438), ``(T, N)`` like all arguments.

    ``delta_t = r_t + gamma V(s'_t) (1 - terminated_t) - V(s_t)``; the sum over later deltas stops at either end of an
    episode.
    """
    deltas = (rewards + gamma * next_values * (1 - terminations) - values).cpu().numpy()
    goes_on = (gamma * gae_lambda * (1 - torch.maximum(terminations, truncations))).cpu().numpy()
    advantage = np.zeros_like(deltas[0])
    for t in range(len(deltas) - 1, -1, -1):
        deltas[t] = advantage = deltas[t] + goes_on[t] * advantage
    return torch.from_numpy(deltas).to(rewards.device)


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


def _held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _gather_ranks(x: Tensor) -> list[Tensor]:
    if not (dist.is_available() and dist.is_initialized()):
        return [x]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return parts
