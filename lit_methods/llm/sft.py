"""Supervised fine-tuning: maximise the probability of given responses."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_methods.batches import PromptBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.llm.language_model import (
    LanguageModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    add_adapters,
    complete,
    encode_prompts,
    encode_responses,
    end_token_ids,
    leave_out,
    load_causal_lm,
    load_tokenizer,
)
from lit_methods.llm.logprobs import response_mask
from lit_methods.llm.sampling import Generation, LocalSampler


class SupervisedFineTuning(LightningModule):
    """Fine-tunes a causal language model on (prompt, response) pairs; only response tokens count, and the end of each.

    Batches are :class:`~lit_methods.batches.PromptBatch` with responses. Logs ``train/loss``, ``val/loss`` and
    ``test/loss`` in nats per token. ``predict_step`` draws one response per prompt. Dropout is switched off.

    Args:
        model: folder or hub id of a causal language model; configuration fields with ``model_type`` for random weights;
            or a ``transformers`` model.
        tokenizer: folder, hub id, ``{"words": [...]}`` or a tokenizer; default: that of ``model``.
        max_prompt_length: longer prompts lose their beginning.
        lora: fields of ``peft.LoraConfig``; ``None`` for full fine-tuning.
        dtype: storage type of the model.
        attn_implementation: see ``transformers``.
        gradient_checkpointing: recompute activations layer by layer.
        micro_batch_size: rows per pass; limits memory, costs a second forward pass.
        max_new_tokens: longest response of ``predict_step``.
        optimizer: builds the optimizer from the trained parameters.

    Raises:
        ValueError: if there is no tokenizer, or a batch has no responses.
    """

    def __init__(
        self,
        model: str | dict[str, Any] | PreTrainedModel,
        tokenizer: str | dict[str, Any] | PreTrainedTokenizerBase | None = None,
        max_prompt_length: int | None = None,
        lora: dict[str, Any] | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        micro_batch_size: int | None = None,
        max_new_tokens: int = 64,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
    ) -> None:
        super().__init__()
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("tokenizer must be given when model is not a folder or hub id")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be 1 or more, got {micro_batch_size}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)  # type: ignore[arg-type]
        self.max_prompt_length = max_prompt_length
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.micro_batch_size = micro_batch_size
        self.max_new_tokens = max_new_tokens
        self.optimizer = optimizer
        self._model = model
        self._loading: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
        self.policy: LanguageModel | None = None

    def configure_model(self) -> None:
        """Load the model once and add the adapter."""
        if self.policy is not None:
            return
        lm: nn.Module = load_causal_lm(self._model, **self._loading)
        if self.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        lm = lm.requires_grad_(True) if self.lora is None else add_adapters(lm, self.lora, [])
        self.policy = LanguageModel(lm).train()

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
        policy, tokenizer = self.policy, self.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        generation = Generation(self.max_new_tokens, end_token_ids(policy.base, tokenizer), pad)
        prompts = encode_prompts(tokenizer, batch.prompts, max_length=self.max_prompt_length, device=self.device)
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        tokens = LocalSampler()([(lambda: nullcontext(policy), 1.0)], prompts, 1, generation, generator)
        mask = response_mask(tokens, generation.eos_token_ids)
        rows = [row[kept].tolist() for row, kept in zip(tokens.cpu(), mask.cpu(), strict=True)]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _loss(self, batch: PromptBatch, stage: str) -> Tensor:
        assert self.policy is not None, "configure_model has not run"
        if not batch.responses:
            raise ValueError("supervised fine-tuning needs responses; set the datamodule's response_column")
        tokenizer = self.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        prompts = encode_prompts(tokenizer, batch.prompts, max_length=self.max_prompt_length, device=self.device)
        responses, mask = encode_responses(tokenizer, batch.responses, pad, self.device)
        logps, _ = self.policy.score(prompts, responses, mask, micro_batch_size=self.micro_batch_size)
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
        leave_out(checkpoint, self._reloadable(checkpoint["state_dict"]))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete the weights from the model, if it is the one that was trained."""
        complete(checkpoint, self._reloadable(self.state_dict()), self._model)

    def _reloadable(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(self._model, str) or self.lora is None:
            return {}
        return {name: tensor for name, tensor in state.items() if "lora_" not in name}
