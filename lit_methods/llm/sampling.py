"""Drawing responses: a decoding loop that shares the prompt among samples, and an optional vLLM back end."""

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from lit_methods.llm.language_model import EncodedPrompts, LanguageModel
from lit_methods.llm.logprobs import position_ids

Player = Callable[[], AbstractContextManager[LanguageModel]]
"""A context manager in which a language model acts as one of the players (its adapter is switched on)."""


@dataclass(frozen=True)
class Generation:
    """How responses are drawn, and when they count as finished.

    Attributes:
        max_new_tokens: longest response, 1 or more.
        temperature: logits are divided by it, positive; the policy that is trained is the tempered one.
        top_k: draw among this many most likely tokens; 0 for all. Anything else biases the gradient.
        top_p: draw among the most likely tokens that hold this much probability, in (0, 1]. Less than 1 biases the
            gradient.
        eos_token_ids: tokens that end a response; empty for the tokenizer's, the generation config's and the one that
            closes an assistant turn in the chat template.
        pad_token_id: what follows the end; modules put their tokenizer's here.
        max_prompt_length: longer prompts lose their beginning; ``None`` for no limit.
        missing_eos_loses: an unfinished response loses against a finished one and ties with an unfinished one.
        seed: seed of the responses, 0 or more.

    Raises:
        ValueError: for a value outside its range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos_token_ids: list[int] = field(default_factory=list)
    pad_token_id: int = 0
    max_prompt_length: int | None = None
    missing_eos_loses: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, where 0 is off, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be >= 1, got {self.max_prompt_length}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")


class Sampler(Protocol):
    """Draws responses; log-probabilities are always computed by the trained model itself."""

    def __call__(
        self,
        players: Sequence[tuple[Player, float]],
        prompts: EncodedPrompts,
        num_samples: int,
        generation: Generation,
        generator: torch.Generator,
    ) -> Tensor:
        """Draw ``num_samples`` responses to every prompt.

        Args:
            players: models with weights; the distribution of each token is their weighted geometric mean.
            prompts: the prompts, left-padded.
            num_samples: responses per prompt.
            generation: how to draw.
            generator: source of randomness, on the device of the prompts.

        Returns:
            tokens ``(prompts * num_samples, length)``, samples of a prompt in a row, ``length <= max_new_tokens``,
            padded after the end.
        """
        ...


class LocalSampler:
    """Decodes with the trained model: the prompt is read once and its key-value cache shared by its samples.

    Rows that have ended leave the batch once they are half of it.
    """

    @torch.no_grad()
    def __call__(
        self,
        players: Sequence[tuple[Player, float]],
        prompts: EncodedPrompts,
        num_samples: int,
        generation: Generation,
        generator: torch.Generator,
    ) -> Tensor:
        """See :class:`Sampler`."""
        with ExitStack() as stack:
            if len(players) == 1:  # enter once; a mixture switches at every token
                model = stack.enter_context(players[0][0]())
                seat = [(lambda: _Entered(model), 1.0)]
                return _sample(seat, prompts, num_samples, generation, generator)
            return _sample(players, prompts, num_samples, generation, generator)


class _Entered:
    """A context that is already open."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def __enter__(self) -> LanguageModel:
        return self.model

    def __exit__(self, *error: object) -> None:
        return None


def _sample(
    players: Sequence[tuple[Player, float]],
    prompts: EncodedPrompts,
    num_samples: int,
    generation: Generation,
    generator: torch.Generator,
) -> Tensor:
    ids, mask = prompts
    attention = None if bool(mask.all()) else mask
    positions = position_ids(mask)
    caches: list[Any] = [None] * len(players)
    logits, synchronised = _mixed_logits(players, ids, attention, positions, caches, generation.temperature)
    logits = logits.repeat_interleave(num_samples, 0)
    if attention is not None:
        attention = attention.repeat_interleave(num_samples, 0)
    positions = positions[:, -1:].repeat_interleave(num_samples, 0)
    for cache in caches:
        cache.batch_repeat_interleave(num_samples)

    rows = len(logits)
    tokens = torch.full((rows, generation.max_new_tokens), generation.pad_token_id, device=ids.device)
    ends = torch.tensor(generation.eos_token_ids, device=ids.device)
    active = torch.arange(rows, device=ids.device)
    alive = torch.ones(rows, dtype=torch.bool, device=ids.device)
    for step in range(generation.max_new_tokens):
        drawn = _draw(logits, generation, generator)
        tokens[active[alive], step] = drawn[alive]
        alive = alive & ~torch.isin(drawn, ends)
        num_alive = int(alive.sum())
        if step + 1 == generation.max_new_tokens or not _anyone(num_alive, synchronised, ids.device):
            return tokens[:, : step + 1]
        if 0 < num_alive <= len(alive) // 2:
            keep = alive.nonzero().squeeze(1)
            active, alive, drawn, positions = active[keep], alive[keep], drawn[keep], positions[keep]
            attention = None if attention is None else attention[keep]
            for cache in caches:
                cache.batch_select_indices(keep)
        positions = positions + 1
        if attention is not None:
            attention = torch.nn.functional.pad(attention, (0, 1), value=1)
        logits, _ = _mixed_logits(players, drawn.unsqueeze(1), attention, positions, caches, generation.temperature)
    return tokens


def _anyone(num_alive: int, synchronised: bool, device: torch.device) -> bool:
    if not synchronised:
        return num_alive > 0
    alive = torch.tensor(num_alive, device=device)
    torch.distributed.all_reduce(alive, op=torch.distributed.ReduceOp.MAX)
    return int(alive) > 0


def _mixed_logits(
    players: Sequence[tuple[Player, float]],
    ids: Tensor,
    attention: Tensor | None,
    positions: Tensor,
    caches: list[Any],
    temperature: float,
) -> tuple[Tensor, bool]:
    """Weighted logits of all players in float32; updates ``caches`` in place."""
    total, synchronised = None, False
    for index, (player, weight) in enumerate(players):
        with player() as model:
            logits, caches[index] = model.decode(ids, attention, positions, caches[index])
            synchronised |= model.synchronised
        logits = logits.float() * (weight / temperature)
        total = logits if total is None else total + logits
    assert total is not None
    return total, synchronised


def _draw(logits: Tensor, generation: Generation, generator: torch.Generator) -> Tensor:
    """One token per row, ``(rows,)``."""
    if 0 < generation.top_k < logits.shape[-1]:
        threshold = logits.topk(generation.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if generation.top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= generation.top_p
        logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
    # argmax p / Exponential(1) is a draw from p
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)


class VLLMSampler:
    """Draws with vLLM on the same GPU; the LoRA adapter is handed over at every call through a temporary folder.

    Log-probabilities are computed by the trained model, because vLLM's differ in the last digits. Only the policy's
    and the frozen adapters of a LoRA model can be served; mixtures and full fine-tuning cannot. Written against the
    documented interface of ``vllm.LLM`` and tested with a stand-in for it, not on a GPU.

    Args:
        model: folder or hub id of the base model.
        gpu_memory_utilization: share of the GPU's memory that vLLM may take.
        max_lora_rank: largest rank of the adapter.
        max_model_len: longest prompt and response together, or ``None`` for the model's own limit.
    """

    def __init__(
        self,
        model: str,
        gpu_memory_utilization: float = 0.3,
        max_lora_rank: int = 64,
        max_model_len: int | None = None,
    ) -> None:
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("VLLMSampler needs vLLM: pip install vllm") from error
        self._vllm = vllm
        self._llm = vllm.LLM(
            model=model,
            enable_lora=True,
            max_lora_rank=max_lora_rank,
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_len,
        )
        self._calls = 0

    @torch.no_grad()
    def __call__(
        self,
        players: Sequence[tuple[Player, float]],
        prompts: EncodedPrompts,
        num_samples: int,
        generation: Generation,
        generator: torch.Generator,
    ) -> Tensor:
        """See :class:`Sampler`."""
        if len(players) != 1:
            raise ValueError("VLLMSampler cannot draw from a mixture of models; leave sampler out")
        from vllm.lora.request import LoRARequest

        self._calls += 1
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        settings = self._vllm.SamplingParams(
            n=num_samples,
            temperature=generation.temperature,
            top_k=generation.top_k or -1,
            top_p=generation.top_p,
            max_tokens=generation.max_new_tokens,
            stop_token_ids=generation.eos_token_ids,
            seed=seed,
            detokenize=False,
        )
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(*prompts, strict=True)]
        with players[0][0]() as model, tempfile.TemporaryDirectory() as folder:
            lm: Any = model.lm
            if not hasattr(lm, "peft_config"):
                raise ValueError("VLLMSampler serves LoRA adapters only; set lora, or leave sampler out")
            adapter = lm.active_adapter
            lm.save_pretrained(folder, selected_adapters=[adapter])
            path = folder if adapter == "default" else f"{folder}/{adapter}"
            request = LoRARequest(f"{adapter}-{self._calls}", self._calls, path)
            outputs = self._llm.generate(
                [{"prompt_token_ids": row} for row in rows], settings, lora_request=request, use_tqdm=False
            )
        drawn = [list(sample.token_ids) for output in outputs for sample in output.outputs]
        length = max(1, *(len(row) for row in drawn))
        padded = [row + [generation.pad_token_id] * (length - len(row)) for row in drawn]
        return torch.tensor(padded, device=prompts.input_ids.device)
