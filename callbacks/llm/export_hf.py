"""Leave the trained language model as a Hugging Face folder."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_methods.callbacks.figures import output_dir


class ExportHF(Callback):
    """Write the policy, its tokenizer and generation settings to a folder when ``fit`` ends.

    A LoRA policy is written as an adapter, or merged into its base. Models, whole or merged, load with
    ``AutoModelForCausalLM.from_pretrained(folder)`` and give the logits of the trained policy. For modules with
    ``policy`` (a :class:`~lit_methods.llm.language_model.LanguageModel`), ``tokenizer`` and ``adapter_base``.

    Args:
        folder: where to write; default ``<log folder>/hf``.
        merge: merge a LoRA adapter into a copy of its base.
    """

    def __init__(self, folder: str | None = None, merge: bool = False) -> None:
        self.folder = folder
        self.merge = merge

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder on rank zero."""
        folder = Path(self.folder) if self.folder else output_dir(trainer) / "hf"
        if trainer.is_global_zero:
            self.export(pl_module, folder)

    def export(self, pl_module: LightningModule, folder: str | Path) -> None:
        """Write a module's policy to a folder at any time.

        Raises:
            ValueError: for a sharded model, whose weights are not all here, and for an adapter without ``merge`` whose
                base is in no folder: changed by a warm-up, merged from an adapter, or built from a configuration.
        """
        module: Any = pl_module
        lm = module.policy.lm
        if any(hasattr(parameter, "full_tensor") for parameter in lm.parameters()):
            raise ValueError("the model is sharded: load its checkpoint on one device and call export there")
        if hasattr(lm, "peft_config"):
            if self.merge:
                lm = deepcopy(lm)
                lm.set_adapter("default")
                lm = lm.merge_and_unload()
                lm.save_pretrained(folder)
            elif module.adapter_base is None:
                raise ValueError(
                    "the adapter's base is in no folder, because it was changed by a warm-up, made by merging another "
                    "adapter, or built from a configuration; set merge=True"
                )
            else:
                lm.save_pretrained(folder, selected_adapters=["default"])
        else:
            lm.save_pretrained(folder)
        module.tokenizer.save_pretrained(folder)
        module.policy.base.generation_config.save_pretrained(folder)
