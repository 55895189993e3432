"""Tiny GLUE tasks and a tokenizer, in the layout of the real ones."""

import random
from pathlib import Path

WORDS = [
    "a",
    "the",
    "cat",
    "dog",
    "runs",
    "sleeps",
    "is",
    "not",
    "red",
    "blue",
    "fast",
    "slow",
    "he",
    "she",
    "it",
    "sees",
]
WORDS += ["house", "tree"]


def write_tokenizer(folder: Path) -> None:
    """Save a BERT tokenizer that knows ``WORDS``."""
    from transformers import BertTokenizerFast

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={token: place for place, token in enumerate(tokens)}).save_pretrained(folder)


def sentence(rng: random.Random) -> str:
    """Some of ``WORDS``."""
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))


def write_glue(folder: Path, train: int = 40, dev: int = 12, test: int = 6) -> None:
    """Write RTE as its official archive unpacks, and the tokenizer, into ``folder``."""
    rng = random.Random(0)
    (folder / "RTE").mkdir()
    for split, count in (("train", train), ("dev", dev), ("test", test)):
        header = ["index", "sentence1", "sentence2"] + (["label"] if split != "test" else [])
        rows = [
            [str(i), sentence(rng), sentence(rng), rng.choice(["entailment", "not_entailment"])] for i in range(count)
        ]
        lines = ["\t".join(row[: len(header)]) for row in [header, *rows]]
        (folder / "RTE" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    if not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer")
