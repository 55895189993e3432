"""Models of a few thousand parameters, built from configurations."""

from pathlib import Path
from typing import Any

from lit_methods.batches import Prompt
from lit_methods.llm.language_model import word_tokenizer
from lit_methods.llm.loading import load_causal_lm

WORDS = [f"w{index}" for index in range(18)]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
PROMPTS = ["w0 w1 w2", "w3", "w4 w5", "w6 w7 w8 w9", "w1", "w2 w2", "w9 w8", "w0"]


def more_low_words(prompt: Prompt, a: str, b: str) -> float:
    """Prefers words with small numbers."""

    def score(text: str) -> float:
        words = text.split()
        return sum(int(word[1:]) < 6 for word in words) / max(1, len(words))

    return 1 / (1 + 10 ** (2 * (score(b) - score(a))))


def save_tiny(folder: Path) -> str:
    """A saved model with its tokenizer, as a user's path."""
    import torch

    torch.manual_seed(3)
    load_causal_lm(LLAMA).save_pretrained(folder)
    word_tokenizer(WORDS).save_pretrained(folder)
    return str(folder)


def save_tiny_chat(folder: Path) -> None:
    """The same with a chat template; unknown words become padding."""
    save_tiny(folder)
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} {% endfor %}w2"
    tokenizer.save_pretrained(folder)


def number_of_words(prompt: Prompt, response: str) -> float:
    """A score for recipes whose own needs something that is not installed."""
    return float(len(response.split()))
