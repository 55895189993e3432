"""On-policy mirror descent policy optimisation (section 4.1 of the paper)."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_methods.batches import RolloutBatch, Spaces
from lit_methods.hyperparameters import live_arguments
from lit_methods.optim import MDPO, MDPOStepSize
from lit_methods.optim.foundation.ranks import gather_objects, rank
from lit_methods.rl.mdpo.agent import Agent, check_fraction, held
from lit_methods.rl.networks import RunningMoments, all_reduce_sum


class OnPolicyMDPO(Agent):
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
            :class:`~lit_methods.optim.MDPO` knows, such as :class:`lit_methods.rl.networks.GaussianPolicy`. Networks
            from there may leave their sizes to the environment.
        critic: maps normalised observations to values ``(...)``.
        observation_shape: shape of one observation; a number means one dimension; None: as the environment has it.
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
        ValueError: an argument out of range; in ``configure_model``, sizes that are not the environment's, or that
            nobody gives.
        TypeError: in ``configure_optimizers``, if ``optimizer`` builds something else than an MDPO.
    """

    def __init__(
        self,
        policy: nn.Module,
        critic: nn.Module,
        observation_shape: int | tuple[int, ...] | None = None,
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
            check_fraction(name, value)
        for name, count in (
            ("critic_epochs", critic_epochs),
            ("critic_batch_size", critic_batch_size),
            ("total_iterations", total_iterations),
        ):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        if value_clip is not None and not 0 < value_clip < float("inf"):
            raise ValueError(f"value_clip must be > 0 and finite, or None, got {value_clip}")
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
        self.observation_shape = (observation_shape,) if isinstance(observation_shape, int) else observation_shape
        if self.observation_shape is not None:
            self.observation_moments = RunningMoments(self.observation_shape)
        self.return_moments = RunningMoments()
        self._discounted: Tensor | None = None  # running discounted return of each environment of this rank

    def parts(self) -> dict[str, nn.Module]:
        """Policy and critic."""
        return {"policy": self.policy, "critic": self.critic}

    def fit_to(self, spaces: Spaces) -> None:
        """Fit the networks and the moments of observations to an environment."""
        super().fit_to(spaces)
        if self.observation_shape is None:
            self.observation_shape = tuple(spaces.observation_shape)
            self.observation_moments = RunningMoments(self.observation_shape).to(self.device)
        elif tuple(self.observation_shape) != tuple(spaces.observation_shape):
            raise ValueError(
                f"observation_shape must be {tuple(spaces.observation_shape)}, as the environment has it, got "
                f"{tuple(self.observation_shape)}"
            )

    def forward(self, observations: Tensor) -> Tensor:
        """Most likely actions for raw observations ``(..., *observation)``."""
        return self.policy(self.normalize(observations)).mode

    @torch.no_grad()
    def act(self, observations: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Actions for raw observations ``(N, *observation)``, and their log-densities ``(N,)``."""
        policy = self.policy(self.normalize(observations))
        actions = policy.mode if deterministic else policy.sample()
        return actions, policy.log_prob(actions)

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        """One iteration."""
        observations = self.normalize(batch.observations)
        rewards = self.scale_rewards(batch) if self.normalize_rewards else batch.rewards
        values, next_values = self.values(observations, batch)
        truncations = batch.truncations if self.bootstrap_truncated else torch.zeros_like(batch.truncations)
        terminations = batch.terminations + batch.truncations - truncations
        advantages = generalized_advantages(
            rewards, values, next_values, terminations, truncations, self.gamma, self.gae_lambda
        )
        returns = (advantages + values).flatten()
        if self.normalize_advantages:
            advantages = standardized(advantages)
        metrics = self._update_policy(observations, batch, advantages)
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
        super().on_save_checkpoint(checkpoint)
        if self._discounted is not None:
            checkpoint["discounted_returns"] = gather_objects(self._discounted)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this rank's running discounted returns."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("discounted_returns")
        self._discounted = saved[rank()] if saved is not None and rank() < len(saved) else None

    def normalize(self, observations: Tensor) -> Tensor:
        """What the networks see of raw observations ``(..., *observation)``."""
        return self.observation_moments.normalize(observations) if self.normalize_observations else observations

    def scale_rewards(self, batch: RolloutBatch) -> Tensor:
        """Rewards ``(T, N)`` over the standard deviation of the discounted return so far, which takes these in."""
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
    def values(self, observations: Tensor, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Values of the observations and of what truly followed them, ``(T, N)`` each."""
        ended = torch.maximum(batch.terminations, batch.truncations).bool()
        ended[-1] = True  # what follows these is not the next row
        last = self.critic(self.normalize(batch.next_observations[ended]))
        values = self.critic(observations)
        following = values.roll(-1, 0)
        following[ended] = last.to(values.dtype)
        return values, following

    def _update_policy(self, observations: Tensor, batch: RolloutBatch, advantages: Tensor) -> dict[str, Tensor]:
        wrapper = self._wrapped_optimizers()[0]
        optimizer: Any = wrapper.optimizer
        parameters = held(optimizer)
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
        parameters = held(optimizer)
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


def standardized(advantages: Tensor) -> Tensor:
    """Advantages minus their mean, over their standard deviation, both over all ranks; zeros where all are equal."""
    x = advantages.double()
    total, number = all_reduce_sum(torch.stack([x.sum(), x.new_tensor(x.numel())]))
    centred = x - total / number
    std = (all_reduce_sum(centred.square().sum()) / number).sqrt()
    return (centred / (std + 1e-8)).to(advantages.dtype)


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
