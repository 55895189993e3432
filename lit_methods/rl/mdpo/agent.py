"""What on-policy and off-policy MDPO share: evaluation, logged returns, sizes from the data, gradients of all ranks."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_methods.batches import EpisodeBatch, Spaces
from lit_methods.lr_find import refuse_lr_finder
from lit_methods.optim.foundation.ranks import mean_over_ranks, world_size
from lit_methods.precision import load_unrounded
from lit_methods.rl.networks import SizedNetwork
from lit_methods.swa import renew_swa_copy

_WINDOW = 40  # training episodes in the logged mean return


class Agent(LightningModule):
    """What both modules share: evaluation, the logged returns, and gradients that all ranks agree on."""

    recent_returns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        self.automatic_optimization = False
        self.spaces: Spaces | None = None
        self.register_buffer("recent_returns", torch.full((_WINDOW,), math.nan))

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names of their arguments."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Take sizes and bounds that were left out from the Trainer's datamodule; refuse given ones that differ.

        Raises:
            ValueError: they differ, or were left out and there is no datamodule that tells them.
        """
        spaces = getattr(getattr(self._trainer, "datamodule", None), "spaces", None)
        unbuilt = [name for name, part in self.parts().items() if isinstance(part, SizedNetwork) and not part.is_built]
        if spaces is not None:
            self.fit_to(spaces)
            renew_swa_copy(self)
        elif self._trainer is not None and unbuilt:  # without a Trainer, a checkpoint may be about to tell them
            raise ValueError(f"the Trainer's datamodule tells no sizes: give those of {', '.join(unbuilt)}")

    def fit_to(self, spaces: Spaces) -> None:
        """Fit the networks to an environment or a data set."""
        for part in self.parts().values():
            if isinstance(part, SizedNetwork):
                part.fit_to(spaces)
        self.spaces = spaces

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sizes, so that a checkpoint is rebuilt without the datamodule."""
        if self.spaces is not None:
            checkpoint["spaces"] = tuple(self.spaces)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make what was left to the datamodule."""
        if self.spaces is None and "spaces" in checkpoint:
            self.fit_to(Spaces(*checkpoint["spaces"]))

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
        if world_size() > 1:
            filled = [_or_zeros(g, p) for g, p in zip(gradients, parameters, strict=True)]
            gradients = tuple(mean_over_ranks(filled))
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g


def held(optimizer: Optimizer) -> list[nn.Parameter]:
    """The optimizer's parameters, of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_fraction(name: str, value: float) -> None:
    """Refuse what is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient
