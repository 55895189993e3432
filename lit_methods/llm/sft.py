"""Supervised fine-tuning: maximise the probability of given responses."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_methods.batches import PromptBatch
from lit_methods.hyperparameters import as_fields, live_arguments, move_arguments
from lit_methods.llm.averaging import refuse_swa, restore_frozen, restore_frozen_in
from lit_methods.llm.language_model import (
    EncodedPrompts,
    LanguageModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    encode_prompts,
    encode_responses,
    end_token_ids,
    load_tokenizer,
)
from lit_methods.llm.loading import Loading, adapter_base, add_adapters, complete, leave_out, load_causal_lm
from lit_methods.llm.logprobs import response_mask
from lit_methods.llm.sampling import Generation, LocalSampler

MOVED = {
    "max_prompt_length": "generation.max_prompt_length",
    "max_new_tokens": "generation.max_new_tokens",
    "dtype": "loading.dtype",
    "attn_implementation": "loading.attn_implementation",
    "gradient_checkpointing": "loading.gradient_checkpointing",
    "micro_batch_size": "loading.micro_batch_size",
}
"""Arguments of version 0.0 -> where their values belong now."""


class SupervisedFineTuning(LightningModule):
    """Fine-tunes a causal language model on (prompt, response) pairs; only response tokens count, and the end of each.

    Batches are :class:`~lit_methods.batches.PromptBatch` with responses. Logs ``train/loss``, ``val/loss`` and
    ``test/loss`` in nats per token. ``predict_step`` draws one response per prompt. Dropout is switched off.

    Args:
        model: folder or hub id of a causal language model, or of an adapter, which is merged into its base before
            training; configuration fields with ``model_type`` for random weights; or a ``transformers`` model.
        tokenizer: folder, hub id, ``{"words": [...]}`` or a tokenizer; default: that of ``model``.
        lora: fields of ``peft.LoraConfig``; ``None`` for full fine-tuning.
        generation: how ``predict_step`` draws responses, and ``max_prompt_length``.
        loading: how the model is loaded and how much memory it may take.
        optimizer: builds the optimizer from the trained parameters.
        **old: arguments under the names of version 0.0, which warn.

    Raises:
        ValueError: if there is no tokenizer, or a batch has no responses.
        TypeError: for an unknown argument.
    """

    moved_arguments: ClassVar[dict[str, str]] = MOVED

    def __init__(
        self,
        model: str | dict[str, Any] | PreTrainedModel,
        tokenizer: str | dict[str, Any] | PreTrainedTokenizerBase | None = None,
        lora: dict[str, Any] | None = None,
        generation: Generation | None = None,
        loading: Loading | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        **old: Any,
    ) -> None:
        super().__init__()
        fields = {"generation": as_fields(generation), "loading": as_fields(loading)}
        move_arguments("SupervisedFineTuning", old, MOVED, fields)
        generation, loading = fields.values()  # type: ignore[assignment]
        self.save_hyperparameters(ignore=live_arguments(locals()))
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("tokenizer must be given when model is not a folder or hub id")
        self.generation = Generation(**fields["generation"])
        self.loading = Loading(**fields["loading"])
        self.tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)  # type: ignore[arg-type]
        self.lora = lora
        self.optimizer = optimizer
        self._model = model
        self.policy: LanguageModel | None = None

    @property
    def adapter_base(self) -> str | None:
        """The folder or hub id whose weights the trained adapter belongs on; ``None`` if they are in no folder."""
        return self._model if isinstance(self._model, str) and adapter_base(self._model) is None else None

    def configure_model(self) -> None:
        """Load the model once and add the adapter."""
        if self.policy is not None:
            return
        lm: nn.Module = load_causal_lm(self._model, self.loading)
        pad = self.tokenizer.pad_token_id
        self.generation = replace(
            self.generation,
            eos_token_ids=self.generation.eos_token_ids or end_token_ids(lm, self.tokenizer),  # type: ignore[arg-type]
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
        )
        lm = lm.requires_grad_(True) if self.lora is None else add_adapters(lm, self.lora, [])
        self.policy = LanguageModel(lm, chunk_size=self.loading.logprob_chunk_size).train()
        if self.loading.torch_compile:
            for block in self.policy.blocks():
                block.compile(dynamic=True)

    def on_fit_start(self) -> None:
        """Refuse averages that would average nothing."""
        refuse_swa(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        """Keep weight averaging callbacks from averaging what is frozen."""
        restore_frozen(self.trainer, self)

    def on_train_epoch_end(self) -> None:
        """The same after their update at an epoch's end."""
        restore_frozen(self.trainer, self)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Mean negative log-probability of the response tokens."""
        return self._loss(batch, "train")

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """The same on held-out pairs."""
        self._loss(batch, "val")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """The same on test pairs."""
        self._loss(batch, "test")

    @torch.no_grad()
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[str]:
        """One drawn response per prompt."""
        assert self.policy is not None, "configure_model has not run"
        policy = self.policy
        prompts = self._encode(batch)
        generator = torch.Generator(self.device).manual_seed(self.generation.seed + batch_idx)
        tokens = LocalSampler()([(lambda: nullcontext(policy), 1.0)], prompts, 1, self.generation, generator)
        mask = response_mask(tokens, self.generation.eos_token_ids)
        rows = [row[kept].tolist() for row, kept in zip(tokens.cpu(), mask.cpu(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _encode(self, batch: PromptBatch) -> EncodedPrompts:
        longest = self.generation.max_prompt_length
        return encode_prompts(self.tokenizer, batch.prompts, max_length=longest, device=self.device)

    def _loss(self, batch: PromptBatch, stage: str) -> Tensor:
        assert self.policy is not None, "configure_model has not run"
        if not batch.responses:
            raise ValueError("supervised fine-tuning needs responses; set the datamodule's response_column")
        pad = self.generation.pad_token_id
        responses, mask = encode_responses(self.tokenizer, batch.responses, pad, self.device)
        micro_batch_size = self.loading.micro_batch_size
        logps, _ = self.policy.score(self._encode(batch), responses, mask, micro_batch_size=micro_batch_size)
        loss = -logps.sum() / mask.sum()
        if self._trainer is not None:
            self.log(f"{stage}/loss", loss, batch_size=len(batch.prompts), sync_dist=stage != "train")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The injected optimizer over the trained weights."""
        assert self.policy is not None, "configure_model has not run"
        return self.optimizer([parameter for parameter in self.policy.parameters() if parameter.requires_grad])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out base weights that can be loaded again, and keep their hash."""
        restore_frozen_in(checkpoint, self)
        leave_out(checkpoint, self._reloadable(checkpoint["state_dict"]))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete the weights from the model, if it is the one that was trained."""
        complete(checkpoint, self._reloadable(self.state_dict()), self._model)

    def _reloadable(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(self._model, str) or self.lora is None:
            return {}
        return {name: tensor for name, tensor in state.items() if "lora_" not in name}
