"""Scoring responses with a causal language model, and its tokenizer."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lit_methods.batches import Prompt
from lit_methods.llm.loading import adapter_base
from lit_methods.llm.logprobs import Head, chunked_logprobs, position_ids

try:
    from transformers import (
        AutoTokenizer,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('language models need transformers: pip install "lit-methods[llm]"') from error


class EncodedPrompts(NamedTuple):
    """Tokenised prompts.

    Attributes:
        input_ids: ``(prompts, length)``, int64, padded on the left.
        attention_mask: ``(prompts, length)``, int64, 1 at real tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def repeat_interleave(self, times: int) -> "EncodedPrompts":
        """Each prompt ``times`` times in a row."""
        return EncodedPrompts(*(tensor.repeat_interleave(times, 0) for tensor in self))


class LanguageModel(nn.Module):
    """A causal language model whose forward pass gives log-probabilities of response tokens.

    A prompt is read once, and its key-value cache shared by its responses, also with gradients. Only the response
    positions go through the head, in chunks (:func:`chunked_logprobs`). At construction the result is compared with the
    model's own logits once; a model that does something unknown to its logits is scored through them instead, with a
    warning. One with another kind of cache, or under gradient checkpointing, reads every prompt again for every
    response. Dropout is set to zero: sampling and scoring must see the same policy.

    Args:
        lm: a ``transformers`` causal language model, or a peft model around one.
        temperature: sampling temperature, positive; scores are those of the tempered distribution.
        chunk_size: response tokens per pass through the head.
    """

    def __init__(self, lm: nn.Module, *, temperature: float = 1.0, chunk_size: int = 1024) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.synchronised = False  # under FSDP every rank must take the same number of decoding steps
        # Gradient checkpointing switches key-value caches off in training mode. Scoring never uses them then, in no
        # mode, so that all players are scored by the same operations and their log-ratios hold no rounding.
        self.checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in lm.modules())
        disable_dropout(lm)
        self.shares_prompts = False
        self.chunked = self._head_agrees()

    @property
    def base(self) -> PreTrainedModel:
        """The ``transformers`` model below an eventual peft wrapper."""
        return self.lm.get_base_model() if hasattr(self.lm, "peft_config") else self.lm  # type: ignore[operator,return-value]

    def head(self) -> Head:
        """The model's head, gathered if it is sharded."""
        layer = self.base.get_output_embeddings()
        config = self.base.config.get_text_config()
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return Head(weight, bias, scale, getattr(config, "final_logit_softcapping", None))

    def blocks(self) -> list[nn.Module]:
        """The decoder blocks."""
        names = set(self.base._no_split_modules or [])
        return [module for module in self.base.modules() if type(module).__name__ in names]

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the weights over a one-dimensional device mesh (FSDP2): each decoder block by itself, then the rest."""
        for block in self.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)  # frozen players have no backward pass to do it
        register_fsdp_forward_method(self, "decode")
        self.synchronised = True

    @torch.no_grad()
    def _head_agrees(self) -> bool:
        layer = self.base.get_output_embeddings()
        if type(layer) is not nn.Linear:
            return False
        if layer.weight.is_meta:
            return True
        size = self.base.config.get_text_config().vocab_size
        tokens = torch.arange(4, device=layer.weight.device).unsqueeze(0) % size
        prompts = EncodedPrompts(tokens[:, :2], torch.ones_like(tokens[:, :2]))
        responses, prompt_of = tokens[:, 2:].expand(2, 2), torch.zeros(2, dtype=torch.int64, device=tokens.device)
        training = self.lm.training
        self.lm.eval()
        logits = self.lm(input_ids=tokens, position_ids=position_ids(torch.ones_like(tokens))).logits.float()
        theirs = torch.log_softmax(logits[0, 1:-1], dim=-1).gather(1, responses[0].unsqueeze(1)).squeeze(1)
        tolerance = 1e-3 if layer.weight.dtype == torch.float32 else 5e-2

        def agree() -> bool:
            ours, _ = chunked_logprobs(self._hidden(prompts, responses, prompt_of)[1], self.head(), responses[1])
            return torch.allclose(ours.float(), theirs, atol=tolerance)

        self.shares_prompts = not self.checkpointing and self._has_plain_cache()
        agrees = agree()
        if not agrees and self.shares_prompts:
            self.shares_prompts = False
            agrees = agree()
        self.lm.train(training)
        if not agrees:
            warnings.warn(
                f"{type(self.base).__name__} transforms its logits in an unknown way: scoring goes through the full "
                "logits, which takes more memory",
                stacklevel=3,
            )
        return agrees

    def _has_plain_cache(self) -> bool:
        """Whether the model remembers nothing but keys and values, in a cache that gradients pass through."""
        layers = getattr(DynamicCache(config=self.base.config), "layers", [])
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def _hidden(self, prompts: EncodedPrompts, responses: Tensor, prompt_of: Tensor) -> Tensor:
        """Hidden states that predict the response tokens, ``(rows, length, hidden)``."""
        decoder = self.base.get_decoder()
        length = responses.shape[1]
        ids, mask = prompts
        inputs = responses[:, :-1]  # nothing follows the last token
        whole_mask = torch.cat([mask[prompt_of], torch.ones_like(inputs)], dim=1)
        if not self.shares_prompts or len(ids) == len(responses):
            whole = torch.cat([ids[prompt_of], inputs], dim=1)
            output = decoder(
                input_ids=whole, attention_mask=whole_mask, position_ids=position_ids(whole_mask), use_cache=False
            )
            return output.last_hidden_state[:, -length:]
        read = decoder(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=True)
        first = read.last_hidden_state[prompt_of, -1:]
        if length == 1:
            return first
        read.past_key_values.batch_select_indices(prompt_of)
        output = decoder(
            input_ids=inputs,
            attention_mask=whole_mask,
            position_ids=position_ids(whole_mask)[:, ids.shape[1] :],
            past_key_values=read.past_key_values,
            use_cache=True,
        )
        return torch.cat([first, output.last_hidden_state], dim=1)

    def forward(
        self, prompts: EncodedPrompts, responses: Tensor, mask: Tensor, prompt_of: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of responses, and the entropies of the distributions they were drawn from.

        Args:
            prompts: distinct prompts.
            responses: tokens padded on the right, ``(rows, length)``.
            mask: which of them count, same shape, bool.
            prompt_of: the prompt that each row answers, ``(rows,)``, int64.

        Returns:
            log-probabilities and entropies, both ``(rows, length)`` and 0 outside the mask.
        """
        targets = responses[mask]
        if self.chunked:
            logps, entropies = chunked_logprobs(
                self._hidden(prompts, responses, prompt_of)[mask],
                self.head(),
                targets,
                temperature=self.temperature,
                chunk_size=self.chunk_size,
            )
        else:
            attention = torch.cat([prompts.attention_mask[prompt_of], torch.ones_like(responses)], dim=1)
            logits = self.lm(
                input_ids=torch.cat([prompts.input_ids[prompt_of], responses], dim=1),
                attention_mask=attention,
                position_ids=position_ids(attention),
                use_cache=False,
                logits_to_keep=responses.shape[1] + 1,
            ).logits[:, -responses.shape[1] - 1 : -1]
            full = torch.log_softmax(logits[mask].float() / self.temperature, dim=-1)
            logps = full.gather(1, targets.unsqueeze(1)).squeeze(1)
            entropies = -(full.exp() * full).sum(-1).detach()
        zeros = torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device)
        return zeros.masked_scatter(mask, logps), zeros.masked_scatter(mask, entropies)

    def score(
        self, prompts: EncodedPrompts, responses: Tensor, mask: Tensor, *, micro_batch_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of responses to prompts, in micro-batches; prompts with short responses come first.

        With gradients and several micro-batches, each keeps nothing but its inputs and is computed again in the
        backward pass, so that the activations of one at a time are in memory.

        Args:
            prompts: the prompts.
            responses: generated tokens, as many rows for every prompt, those of a prompt in a row, ``(rows, length)``.
            mask: which of them count, ``(rows, length)``, bool.
            micro_batch_size: rows per pass; ``None`` for all at once.

        Returns:
            log-probabilities and entropies, both ``(rows, length)`` and 0 outside the mask.
        """
        rows, length = mask.shape
        num = rows // len(prompts.input_ids)
        size = micro_batch_size or rows
        order = torch.arange(rows, device=mask.device)
        if size < rows:
            longest = mask.sum(1).view(-1, num).amax(1)
            order = order.view(-1, num)[longest.argsort(stable=True)].flatten()
        parts = []
        for chosen in order.split(size):
            used = max(1, int(mask[chosen].sum(1).max()))
            needed, prompt_of = torch.unique(chosen // num, return_inverse=True)
            prompt_mask = prompts.attention_mask[needed]
            first = int(prompt_mask.any(0).int().argmax())
            read = EncodedPrompts(prompts.input_ids[needed, first:], prompt_mask[:, first:])
            inputs = (read, responses[chosen, :used], mask[chosen, :used], prompt_of)
            if size < rows and torch.is_grad_enabled():
                scores = checkpoint(self.__call__, *inputs, use_reentrant=False)
            else:
                scores = self(*inputs)
            parts.append([nn.functional.pad(score, (0, length - used)) for score in scores])
        back = order.argsort()
        logps, entropies = (torch.cat(tensors)[back] for tensors in zip(*parts, strict=True))
        return logps, entropies

    def decode(
        self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        """Logits ``(rows, vocabulary)`` of the next token, at temperature 1, and the new key-value cache."""
        output = self.lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], output.past_key_values


def load_tokenizer(tokenizer: str | Mapping[str, Any] | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Load a tokenizer, or build one that knows a list of words.

    Args:
        tokenizer: a local folder or hub id; ``{"words": [...]}`` for a word-level toy tokenizer with the special
            tokens ``<pad>`` (0) and ``<eos>`` (1); or a tokenizer, which is returned as it is.

    Raises:
        ValueError: if it has no end-of-sequence token.
    """
    if isinstance(tokenizer, Mapping):
        tokenizer = word_tokenizer(tokenizer["words"])
    elif isinstance(tokenizer, str):
        tokenizer = load_any_tokenizer(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no EOS token: responses could never end; set tokenizer.eos_token")
    return tokenizer


def load_any_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; an adapter that was saved without one has that of its base."""
    base = adapter_base(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        if base is None:
            raise
        return AutoTokenizer.from_pretrained(base)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at white space and knows these words, ``<pad>`` (0) and ``<eos>`` (1)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def end_token_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's, the generation config's, and the chat template's own."""
    ends = {tokenizer.eos_token_id}
    configured = getattr(lm.generation_config, "eos_token_id", None)
    ends.update(configured if isinstance(configured, list) else [] if configured is None else [configured])
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "closing-answer"}]
        tail = str(tokenizer.apply_chat_template(turns, tokenize=False)).split("closing-answer")[-1]
        tokens = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]
        if tokens and tokens[0] in {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}:
            ends.add(tokens[0])
    size = lm.config.get_text_config().vocab_size
    return sorted(end for end in ends if end is not None and end < size)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text that the model continues: a plain prompt as it is, chat messages through the chat template."""
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise ValueError("prompts are chat messages, but the tokenizer has no chat_template; use plain prompts")
    return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> EncodedPrompts:
    """Tokenise prompts and pad them on the left.

    Templates write their own special tokens, so chat prompts are tokenised without adding any.

    Args:
        tokenizer: the model's tokenizer.
        prompts: plain texts or lists of chat messages.
        max_length: longer prompts lose their beginning, with a warning.
        device: where the tensors go.

    Raises:
        ValueError: if a prompt has no tokens.
    """
    rows = [
        tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=isinstance(prompt, str))["input_ids"]
        for prompt in prompts
    ]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ValueError(f"prompt {prompt!r} is empty after tokenisation; filter empty prompts")
    if max_length is not None and any(len(row) > max_length for row in rows):
        warnings.warn(
            f"{sum(len(row) > max_length for row in rows)} prompts are longer than max_prompt_length={max_length} "
            "tokens and were cut on the left",
            stacklevel=2,
        )
        rows = [row[-max_length:] for row in rows]
    length = max(len(row) for row in rows)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return EncodedPrompts(input_ids.to(device), mask.to(device))


def disable_dropout(lm: nn.Module) -> None:
    """Set every dropout probability of a model to zero, in modules and in the plain floats that attention reads."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "hidden_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, responses: list[str], pad_token_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Tokens of wanted responses with the end of sequence, padded on the right, and their mask, ``(rows, length)``."""
    rows = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in responses]
    length = max(len(row) for row in rows)
    tokens = torch.tensor([row + [pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return tokens.to(device), mask.to(device)
