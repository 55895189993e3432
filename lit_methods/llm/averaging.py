"""What language models ask of Lightning's weight averaging callbacks: average what is trained, and nothing else."""

from itertools import chain
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lit_methods.llm.loading import STATES


def refuse_swa(trainer: Trainer) -> None:
    """Refuse ``StochasticWeightAveraging``, which would average nothing without a word.

    Raises:
        ValueError: if it is among the trainer's callbacks.
    """
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "StochasticWeightAveraging copies the module before configure_model loads its weights, and so averages "
            "nothing; use WeightAveraging or EMAWeightAveraging"
        )


@torch.no_grad()
def restore_frozen(trainer: Trainer, module: LightningModule) -> None:
    """Give frozen weights and buffers back to the averages: sums of equal numbers drift, in bfloat16 by percents."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average: Any = getattr(callback, "_average_model", None)
        if isinstance(callback, WeightAveraging) and average is not None:
            averages = chain(average.module.parameters(), average.module.buffers())
            for mean, tensor in zip(averages, chain(module.parameters(), module.buffers()), strict=True):
                if not tensor.requires_grad:
                    mean.copy_(tensor)


def restore_frozen_in(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """The same for a checkpoint that is being written between an average's update and :func:`restore_frozen`."""
    if checkpoint.keys() >= STATES:
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        current = checkpoint["current_model_state"]
        checkpoint["state_dict"] = {
            name: mean if name in trained else current[name] for name, mean in checkpoint["state_dict"].items()
        }
