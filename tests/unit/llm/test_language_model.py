import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_methods.llm.language_model import (
    EncodedPrompts,
    LanguageModel,
    encode_prompts,
    encode_responses,
    end_token_ids,
    load_tokenizer,
    word_tokenizer,
)
from lit_methods.llm.loading import Loading, build_config, load_causal_lm, weights_hash
from lit_methods.llm.logprobs import position_ids
from tests.unit.llm.tiny import LLAMA, WORDS, save_tiny

SMALL: dict[str, Any] = {"vocab_size": 40, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
ATTENTION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ARCHITECTURES: list[dict[str, Any]] = [
    LLAMA,
    {"model_type": "gpt2", **SMALL, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64},
    {"model_type": "qwen2", **SMALL, **ATTENTION, "num_key_value_heads": 1, "tie_word_embeddings": True},
    {"model_type": "gemma2", **SMALL, **ATTENTION, "num_key_value_heads": 1, "head_dim": 8,
     "final_logit_softcapping": 0.5, "sliding_window": 3},
    {"model_type": "granite", **SMALL, **ATTENTION, "num_key_value_heads": 1, "logits_scaling": 4.0},
    {"model_type": "cohere", **SMALL, **ATTENTION, "num_key_value_heads": 1, "logit_scale": 0.3},
    {"model_type": "gpt_neox", **SMALL, **ATTENTION},
    {"model_type": "opt", **SMALL, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
     "word_embed_proj_dim": 16, "max_position_embeddings": 64},
]  # fmt: skip


def build(fields: dict[str, Any]) -> LanguageModel:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a head that disagrees with the model warns
        return LanguageModel(load_causal_lm({"initializer_range": 0.3, **fields}))


def direct(model: LanguageModel, prompt: Tensor, response: Tensor) -> Tensor:
    """One unpadded sequence through the model's own logits."""
    tokens = torch.cat([prompt, response]).unsqueeze(0)
    positions = position_ids(torch.ones_like(tokens))
    logits = model.lm(input_ids=tokens, position_ids=positions).logits[0, len(prompt) - 1 : -1]
    return (logits / model.temperature).log_softmax(-1).gather(1, response.unsqueeze(1)).squeeze(1)


def padded(prompts: list[Tensor], responses: list[Tensor]) -> tuple[EncodedPrompts, Tensor, Tensor]:
    """Prompts, responses and their mask."""
    left, right = max(map(len, prompts)), max(map(len, responses)) + 1
    encoded = EncodedPrompts(
        torch.stack([nn.functional.pad(row, (left - len(row), 0)) for row in prompts]),
        torch.stack([nn.functional.pad(torch.ones_like(row), (left - len(row), 0)) for row in prompts]),
    )
    tokens = torch.stack([nn.functional.pad(row, (0, right - len(row))) for row in responses])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (0, right - len(row))) for row in responses]).bool()
    return encoded, tokens, mask


PROMPTS = [torch.tensor(row) for row in ([3, 4, 5, 6], [7], [8, 9])]
RESPONSES = [torch.tensor(row) for row in ([5, 1], [6, 7, 8, 2, 1], [9, 1], [1], [4, 4, 1], [3, 2])]


@pytest.mark.parametrize("fields", ARCHITECTURES, ids=[fields["model_type"] for fields in ARCHITECTURES])
@pytest.mark.parametrize("micro_batch_size", [None, 2, 3])
@pytest.mark.parametrize("num", [1, 2])
def test_scores_do_not_depend_on_padding_or_batching(
    fields: dict[str, Any], micro_batch_size: int | None, num: int
) -> None:
    model = build(fields)
    assert model.chunked
    assert model.shares_prompts
    responses = RESPONSES[: num * len(PROMPTS)]
    encoded, tokens, mask = padded(PROMPTS, responses)
    logps, entropy = model.score(encoded, tokens, mask, micro_batch_size=micro_batch_size)
    assert (logps[~mask] == 0).all()
    assert (entropy[mask] > 0).all()
    for row, response in enumerate(responses):
        expected = direct(model, PROMPTS[row // num], response)
        torch.testing.assert_close(logps[row, : len(response)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fields", ARCHITECTURES, ids=[fields["model_type"] for fields in ARCHITECTURES])
def test_prompts_are_read_once_with_the_same_gradient(fields: dict[str, Any]) -> None:
    model = build(fields)
    encoded, tokens, mask = padded(PROMPTS, RESPONSES)
    read: list[int] = []
    embeddings = model.base.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))

    def gradients() -> list[Tensor]:
        read.clear()
        weights = torch.linspace(-1.0, 1.0, mask.numel()).view(mask.shape)
        loss = (model.score(encoded, tokens, mask)[0] * weights).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return [grad for grad in grads if grad is not None]

    shared = gradients()
    assert sum(read) == 3 * 4 + 6 * 4
    model.shares_prompts = False
    alone = gradients()
    assert sum(read) == 6 * (4 + 4)
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_caches_that_are_no_plain_keys_and_values_are_not_shared() -> None:
    model = build({"model_type": "lfm2", **SMALL, **ATTENTION, "num_hidden_layers": 2, "num_key_value_heads": 1,
                   "layer_types": ["conv", "full_attention"]})  # fmt: skip
    assert model.chunked
    assert not model.shares_prompts
    encoded, tokens, mask = padded(PROMPTS[:1], RESPONSES[:2])
    logps, _ = model.score(encoded, tokens, mask)
    torch.testing.assert_close(logps[1, :5], direct(model, PROMPTS[0], RESPONSES[1]), atol=1e-4, rtol=0)
    logps.sum().backward()


def test_micro_batches_give_the_same_gradient() -> None:
    model = build(LLAMA)
    prompts = EncodedPrompts(torch.randint(2, 20, (5, 3)), torch.ones(5, 3, dtype=torch.int64))
    tokens = torch.randint(2, 20, (5, 4))
    mask = torch.arange(4) < torch.tensor([[1], [4], [2], [3], [4]])
    grads = []
    for size in (None, 2):
        loss = model.score(prompts, tokens, mask, micro_batch_size=size)[0].sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for whole, parts in zip(*grads, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_unknown_heads_go_through_the_models_own_logits() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 3

    torch.manual_seed(0)
    lm = load_causal_lm(LLAMA)
    odd = Odd(16, 20, bias=False)
    odd.weight = lm.lm_head.weight
    lm.lm_head = odd
    model = LanguageModel(lm)
    assert not model.chunked
    prompts = EncodedPrompts(torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.int64))
    logps, _ = model.score(prompts, torch.tensor([[5, 1]]), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(logps[0], direct(model, torch.tensor([3, 4]), torch.tensor([5, 1])))


def test_a_scaled_head_the_configuration_hides_is_noticed() -> None:
    lm = load_causal_lm(
        {"model_type": "granite", **SMALL, **ATTENTION, "num_key_value_heads": 1, "initializer_range": 1.0}
    )
    original = lm.forward
    lm.forward = lambda **inputs: type(out := original(**inputs))(**{**out, "logits": out.logits * 7})
    with pytest.warns(UserWarning, match="unknown way"):
        assert not LanguageModel(lm).chunked


def test_dropout_is_off_in_training_mode() -> None:
    for fields in ARCHITECTURES:
        names = ("attention_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout")
        model = build({**fields, **dict.fromkeys(names, 0.5)}).train()
        prompts = EncodedPrompts(torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.int64))
        tokens, mask = torch.tensor([[5, 7, 1]]), torch.ones(1, 3, dtype=torch.bool)
        first, second = (model.score(prompts, tokens, mask)[0] for _ in range(2))
        assert torch.equal(first, second), fields["model_type"]


def test_prompts_are_padded_left_and_cut_left() -> None:
    tokenizer = word_tokenizer(WORDS)
    with pytest.warns(UserWarning, match="1 prompts are longer"):
        ids, mask = encode_prompts(tokenizer, ["w0 w1 w2 w3", "w5"], max_length=3)
    assert ids.tolist() == [[3, 4, 5], [0, 0, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    with pytest.raises(ValueError, match="empty after"):
        encode_prompts(tokenizer, ["w0", "  "])
    with pytest.raises(ValueError, match="chat_template"):
        encode_prompts(tokenizer, [[{"role": "user", "content": "w0"}]])


def test_chat_prompts_get_the_template_and_no_second_bos() -> None:
    tokenizer = word_tokenizer([*WORDS, "<user>", "<assistant>"])
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<turn_end>"]})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }} <turn_end>{% endfor %}"
        "{% if add_generation_prompt %} <assistant>{% endif %}"
    )
    ids, _ = encode_prompts(tokenizer, [[{"role": "user", "content": "w3"}]])
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["<bos>", "<user>", "w3", "<turn_end>", "<assistant>"]
    lm = load_causal_lm({**LLAMA, "vocab_size": 30, "eos_token_id": [1, 6]})
    assert end_token_ids(lm, tokenizer) == sorted({1, 6, tokenizer.convert_tokens_to_ids("<turn_end>")})


def test_wanted_responses_end() -> None:
    tokens, mask = encode_responses(word_tokenizer(WORDS), ["w0 w1", ""], 0, "cpu")
    assert tokens.tolist() == [[2, 3, 1], [1, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_loading(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    lm = load_causal_lm(path, Loading(architecture={"model_type": "llama", "hidden_size": 16}))
    assert lm.dtype == torch.float32
    assert load_causal_lm(lm) is lm
    assert load_causal_lm(path, Loading(dtype="bfloat16")).dtype == torch.bfloat16
    assert len(load_tokenizer(path)) == 20
    with pytest.raises(ValueError, match="hidden_size=32"):
        load_causal_lm(path, Loading(architecture={"hidden_size": 32}))
    with pytest.raises(ValueError, match="model_type"):
        build_config({"hidden_size": 4})
    tokenizer = word_tokenizer(WORDS)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        load_tokenizer(tokenizer)


def test_hash_sees_names_values_and_types_only() -> None:
    state = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    assert weights_hash(state) == weights_hash(dict(reversed(state.items())))
    assert weights_hash(state) != weights_hash({**state, "a": torch.arange(3.0) + 1e-7})
    assert weights_hash(state) != weights_hash({"a": state["a"], "c": state["b"]})
    assert weights_hash(state) != weights_hash({**state, "b": torch.ones(2, dtype=torch.float16)})
