"""Online imitation learning: the experiment that target-based surrogates were made for (arXiv 2302.02607).

In each round somebody acts, the expert says what it would have done, and the learner takes one step on the round's
loss. Simulator and expert are the expensive oracle, so a step may well contain many passes of the policy network.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_methods.batches import ImitationBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.lr_find import refuse_lr_finder
from lit_methods.optim import SSO
from lit_methods.precision import load_unrounded

__all__ = ["OnlineImitation"]


class OnlineImitation(LightningModule):
    """A policy that imitates an expert on states that it visits itself.

    The loss of a round is the squared error of the actions, summed over their coordinates, averaged over the round's
    states; the targets of :class:`~lit_methods.optim.SSO` are the actions. Any other optimizer takes ordinary steps on
    the same loss (manual optimization; closures may be called again).

    Logs ``train/loss`` (the round's loss before its step), ``train/cumulative_loss`` (their sum, the online learner's
    loss), ``val/loss``, ``val/return`` and ``val/length`` (of the learner's own episodes), and the same for ``test``.

    Args:
        policy: maps observations ``(batch, observation_size)`` to actions ``(batch, action_size)``, before they are
            clipped or squashed.
        zero_init: start with all parameters 0, as the paper does with linear policies.
        optimizer: builds the optimizer; default: an SSO with η = 1/L, which projects the expert's actions on what the
            policy can do.
    """

    cumulative_loss: Tensor

    def __init__(
        self,
        policy: nn.Module,
        zero_init: bool = False,
        optimizer: OptimizerCallable = lambda params: SSO(params, lr=None, loss="mse"),
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.automatic_optimization = False
        self.policy = policy
        self.optimizer = optimizer
        self.register_buffer("cumulative_loss", torch.zeros((), dtype=torch.float64))
        if zero_init:
            for p in policy.parameters():
                nn.init.zeros_(p)

    def on_train_start(self) -> None:
        """Refuse Lightning's search for a learning rate."""
        refuse_lr_finder(self)

    def forward(self, observations: Tensor) -> Tensor:
        """The policy's actions, ``(batch, action_size)``."""
        return self.policy(observations)

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        """The same without gradients, in evaluation mode."""
        training = self.policy.training
        actions = self.policy.eval()(observations)
        self.policy.train(training)
        return actions

    def training_step(self, batch: ImitationBatch, batch_idx: int) -> Tensor:
        """Take one step on the round's loss."""
        optimizer: Any = self.optimizers()

        def targets_and_loss() -> Any:
            return self(batch.observations), lambda actions: _squared_error(actions, batch.actions)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = _squared_error(self(batch.observations), batch.actions)
            self.manual_backward(loss)
            return loss.detach()

        loss = optimizer.step(targets_and_loss if isinstance(optimizer, SSO) else closure)
        mean: Any = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        self.cumulative_loss += mean
        self.log("train/loss", mean)
        self.log("train/cumulative_loss", self.cumulative_loss.float())
        return loss

    def validation_step(self, batch: ImitationBatch, batch_idx: int) -> None:
        """Evaluate whole episodes of the learner."""
        self._evaluate(batch, "val")

    def test_step(self, batch: ImitationBatch, batch_idx: int) -> None:
        """Evaluate whole episodes of the learner."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: ImitationBatch, batch_idx: int) -> Tensor:
        """The policy's actions."""
        return self(batch.observations)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The injected optimizer over the policy's trainable parameters."""
        return self.optimizer(p for p in self.policy.parameters() if p.requires_grad)

    def _evaluate(self, batch: ImitationBatch, stage: str) -> None:
        episodes = batch.ends.sum()
        values = {
            "loss": _squared_error(self(batch.observations), batch.actions),
            "return": batch.rewards.sum() / episodes,
            "length": len(batch.rewards) / episodes,
        }
        named = {f"{stage}/{name}": value for name, value in values.items()}
        self.log_dict(named, batch_size=len(batch.rewards), sync_dist=True)


def _squared_error(actions: Tensor, labels: Tensor) -> Tensor:
    return (actions - labels).square().sum(1).mean()
