import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_methods.llm.language_model import (
    EncodedPrompts,
    LanguageModel,
    encode_prompts,
    word_tokenizer,
)
from lit_methods.llm.loading import add_adapters, load_causal_lm
from lit_methods.llm.logprobs import position_ids, response_mask
from lit_methods.llm.sampling import Generation, LocalSampler, VLLMSampler
from tests.unit.llm.tiny import LLAMA, LORA, WORDS


def model(seed: int = 0, **fields: Any) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(load_causal_lm({**LLAMA, "initializer_range": 0.5, **fields})).eval()


def player(lm: LanguageModel) -> Any:
    return lambda: nullcontext(lm)


def next_distribution(lm: LanguageModel, tokens: list[int]) -> Tensor:
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return lm.lm(input_ids=ids, position_ids=position_ids(torch.ones_like(ids))).logits[0, -1]


def settings(**changes: Any) -> Generation:
    return Generation(**({"max_new_tokens": 5, "eos_token_ids": [1], "pad_token_id": 0} | changes))


def draw(players: Any, prompts: EncodedPrompts, num: int, generation: Generation, seed: int = 0) -> Tensor:
    return LocalSampler()(players, prompts, num, generation, torch.Generator().manual_seed(seed))


PADDED = EncodedPrompts(torch.tensor([[3, 4, 5], [0, 0, 7]]), torch.tensor([[1, 1, 1], [0, 0, 1]]))


def assert_frequencies(drawn: Tensor, probs: Tensor) -> None:
    counts = torch.bincount(drawn, minlength=len(probs)).double()
    expected = probs.double() * len(drawn)
    chi2 = ((counts - expected).square() / expected.clamp(min=1e-9))[expected > 5].sum()
    assert chi2 < 60  # 19 degrees of freedom: p < 1e-5
    assert counts[probs == 0].sum() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_follow_the_models_distribution_behind_left_padding(temperature: float) -> None:
    lm = model()
    tokens = draw([(player(lm), 1.0)], PADDED, 4000, settings(max_new_tokens=2, temperature=temperature))
    first = tokens.view(2, 4000, 2)
    for row, prompt in enumerate(([3, 4, 5], [7])):
        probs = (next_distribution(lm, prompt) / temperature).softmax(-1)
        assert_frequencies(first[row, :, 0], probs)
        follower = int(probs[2:].argmax()) + 2
        second = first[row, first[row, :, 0] == follower, 1]
        assert_frequencies(second, (next_distribution(lm, [*prompt, follower]) / temperature).softmax(-1))


def test_cache_compaction_and_positions_agree_with_scoring_from_scratch() -> None:
    """At temperature near zero the draw is greedy, also long after other rows have left the batch."""
    for fields in ({}, {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64}):
        lm = model(3, **fields)
        prompts = encode_prompts(word_tokenizer(WORDS), ["w0 w1 w2", "w3", "w4 w5", "w6 w7 w8 w9", "w1", "w9 w8"])
        tokens = draw([(player(lm), 1.0)], prompts, 2, settings(max_new_tokens=12, temperature=1e-6))
        mask = response_mask(tokens, [1])
        for row in range(12):
            context = prompts.input_ids[row // 2][prompts.attention_mask[row // 2].bool()].tolist()
            for token in tokens[row][mask[row]].tolist():
                assert token == next_distribution(lm, context).argmax()
                context.append(token)


def test_after_the_end_comes_padding() -> None:
    tokens = draw([(player(model()), 1.0)], PADDED, 50, settings(max_new_tokens=8, pad_token_id=9))
    mask = response_mask(tokens, [1])
    assert (tokens[~mask] == 9).all()
    assert (~mask).any()
    same = draw([(player(model()), 1.0)], PADDED, 50, settings(max_new_tokens=8, pad_token_id=1))
    assert torch.equal(response_mask(same, [1]), mask)  # padding with the end token changes nothing


def test_several_end_tokens() -> None:
    tokens = draw([(player(model()), 1.0)], PADDED, 100, settings(max_new_tokens=8, eos_token_ids=[1, 5, 6]))
    mask = response_mask(tokens, [1, 5, 6])
    inside = tokens.masked_fill(~mask, 2)[:, :-1]
    assert not torch.isin(inside[mask[:, 1:]], torch.tensor([1, 5, 6])).any()


def test_mixture_is_the_geometric_mean_of_two_models() -> None:
    policy, reference = model(0), model(1)
    mixed = [(player(policy), 0.75), (player(reference), 0.25)]
    tokens = draw(mixed, PADDED, 4000, settings(max_new_tokens=1)).view(2, 4000)
    logits = 0.75 * next_distribution(policy, [7]) + 0.25 * next_distribution(reference, [7])
    assert_frequencies(tokens[1], logits.softmax(-1))


def test_top_k_and_top_p() -> None:
    lm = model()
    probs = next_distribution(lm, [7]).softmax(-1)
    best = probs.topk(3).indices
    tokens = draw([(player(lm), 1.0)], PADDED, 500, settings(max_new_tokens=1, top_k=3)).view(2, 500)
    assert set(tokens[1].tolist()) <= set(best.tolist())
    nucleus = draw([(player(lm), 1.0)], PADDED, 500, settings(max_new_tokens=1, top_p=0.5)).view(2, 500)[1]
    ordered = probs.sort(descending=True)
    size = int((ordered.values.cumsum(0) < 0.5).sum()) + 1
    assert set(nucleus.tolist()) <= set(ordered.indices[:size].tolist())


def test_same_generator_same_draws() -> None:
    first, second = (draw([(player(model()), 1.0)], PADDED, 8, settings(), seed=4) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw([(player(model()), 1.0)], PADDED, 8, settings(), seed=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_vllm_is_asked_with_the_current_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class LLM:
        def __init__(self, **options: Any) -> None:
            assert options["enable_lora"]

        def generate(self, prompts: Any, params: Any, lora_request: Any, use_tqdm: bool) -> Any:
            from safetensors.torch import load_file

            asked.append((prompts, params, lora_request, load_file(f"{lora_request.path}/adapter_model.safetensors")))
            row = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5] * (1 + i) + [1]) for i in range(params.n)])
            return [row for _ in prompts]

    vllm, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    request.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)  # type: ignore[attr-defined]
    for name, module in (("vllm", vllm), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    lm = LanguageModel(add_adapters(load_causal_lm(LLAMA), LORA, ["target"]))
    sampler = VLLMSampler("base")
    tokens = sampler([(player(lm), 1.0)], PADDED, 2, settings(), torch.Generator().manual_seed(0))
    assert tokens.tolist() == [[5, 1, 0], [5, 5, 1]] * 2
    prompts, params, lora_request, weights = asked[0]
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [[3, 4, 5], [7]]
    assert (params.n, params.stop_token_ids, params.max_tokens) == (2, [1], 5)
    assert weights
    assert lora_request.number == 1
    lm.lm.set_adapter("target", inference_mode=True)
    sampler([(player(lm), 1.0)], PADDED, 2, settings(), torch.Generator().manual_seed(0))
    assert asked[1][2].name.startswith("target")
    with pytest.raises(ValueError, match="mixture"):
        sampler([(player(lm), 0.5)] * 2, PADDED, 2, settings(), torch.Generator())
    with pytest.raises(ValueError, match="LoRA"):
        sampler([(player(model()), 1.0)], PADDED, 2, settings(), torch.Generator())


def test_vllm_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install vllm"):
        VLLMSampler("base")
