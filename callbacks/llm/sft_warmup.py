"""Supervised warm-up of a language model before its method starts."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_methods.batches import PromptBatch


class SFTWarmup(Callback):
    """Fine-tune the policy on the training data's own responses when ``fit`` starts, and make that the reference.

    All weights of the policy are trained, also under LoRA, where the adapter still does nothing; the module then takes
    the result as its reference and target. Happens once: a run that resumes from a checkpoint skips it. For modules
    with ``supervised_loss(prompts, responses)``, ``policy`` and ``restart_from_policy()``, such as
    :class:`~lit_methods.llm.NashMP`, on one device or under DDP.

    Args:
        steps: optimizer steps, at least 1; epochs repeat as needed.
        lr: learning rate of AdamW, falling linearly to zero.
        max_grad_norm: gradient clipping.

    Raises:
        ValueError: for an argument outside its range, or training data without responses.
    """

    def __init__(self, steps: int = 300, lr: float = 1e-3, max_grad_norm: float = 1.0) -> None:
        if steps < 1:
            raise ValueError(f"steps must be 1 or more, got {steps}")
        if not (0 < lr < float("inf") and 0 < max_grad_norm < float("inf")):
            raise ValueError(f"lr and max_grad_norm must be > 0 and finite, got {lr} and {max_grad_norm}")
        self.steps = steps
        self.lr = lr
        self.max_grad_norm = max_grad_norm
        self.done = False
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """Whether the warm-up has happened."""
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Skip the warm-up of a resumed run."""
        self.done = state_dict["done"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train."""
        if self.done:
            return
        module: Any = pl_module
        if any(hasattr(parameter, "full_tensor") for parameter in module.policy.parameters()):
            raise ValueError(
                "SFTWarmup does not work on a sharded model; use strategy: ddp, or SupervisedFineTuning first"
            )
        parameters = [p for p in module.policy.parameters() if p.is_floating_point()]
        needed_grad = [p.requires_grad for p in parameters]
        trained = [p for name, p in module.policy.named_parameters() if p.is_floating_point() and "lora_" not in name]
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / self.steps)
        batches = _forever(trainer)
        self.losses = []
        for _ in range(self.steps):
            batch = next(batches)
            if not batch.responses:
                raise ValueError("SFTWarmup needs training data with responses; set the datamodule's response_column")
            with trainer.precision_plugin.train_step_context():
                loss = module.supervised_loss(batch.prompts, batch.responses)
            # autograd.grad leaves alone what DDP hangs on the parameters
            grads = torch.autograd.grad(loss, trained, allow_unused=True)
            for parameter, grad in zip(trained, grads, strict=True):
                parameter.grad = grad
                if grad is not None and trainer.world_size > 1:
                    dist.all_reduce(grad)
                    grad.div_(trainer.world_size)
            torch.nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
            optimizer.step()
            schedule.step()
            self.losses.append(loss.item())
        for parameter, needed in zip(parameters, needed_grad, strict=True):
            parameter.requires_grad_(needed)
            parameter.grad = None
        module.restart_from_policy()
        self.done = True


def _forever(trainer: Trainer) -> Iterator[PromptBatch]:
    """Training batches without end, from a loader of its own."""
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None:
        raise ValueError("SFTWarmup needs a datamodule: trainer.fit(module, datamodule=...)")
    loader = datamodule.train_dataloader()
    epoch = 0
    while True:
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1
