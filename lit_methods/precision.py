"""Loading weights without rounding them."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from torch import Tensor, nn


def load_unrounded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a module the precision of its Trainer, or else that of wider weights, before it loads them.

    A hook: ``self.register_load_state_dict_pre_hook(load_unrounded)`` in a LightningModule's constructor. Lightning 2.6
    loads a checkpoint before it converts the module to ``precision="64-true"``, so that what was float64 comes back
    rounded to float32; and ``load_from_checkpoint`` builds a float32 module.

    Args:
        module: the LightningModule.
        state_dict: what is about to be loaded.
        prefix: of the module's names in it.
    """
    trainer = getattr(module, "_trainer", None)
    if trainer is not None and isinstance(module, LightningModule):
        convert_to_precision(trainer, module)
        return
    for owner_name, owner in module.named_modules(prefix=prefix.rstrip(".")):
        for name, value in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            saved = state_dict.get(f"{owner_name}.{name}" if owner_name else name)
            if isinstance(saved, Tensor) and saved.is_floating_point() and saved.element_size() > value.element_size():
                value.data = value.data.to(saved.dtype)


def convert_to_precision(trainer: Trainer, module: LightningModule) -> None:
    """Convert a module to ``64-true``, ``bf16-true`` or ``16-true`` as Lightning will do later anyway."""
    if isinstance(trainer.precision_plugin, DoublePrecision | HalfPrecision):
        trainer.precision_plugin.convert_module(module)
