import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lit_methods.datamodules import PromptDataModule, WordGameDataModule


def ready(*arguments: Any, **options: Any) -> PromptDataModule:
    data = PromptDataModule(*arguments, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def test_formats(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(6)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.txt").write_text("\n".join(row["prompt"] for row in rows))
    for suffix in ("jsonl", "json", "txt"):
        data = ready(str(tmp_path / f"x.{suffix}"), val_size=0, batch_size=6)
        (batch,) = list(data.train_dataloader())
        assert sorted(batch.prompts) == [f"p{i}" for i in range(6)]
        for prompt, index in zip(batch.prompts, batch.rows.tolist(), strict=True):
            assert prompt == f"p{index}"
        expected = [prompt.replace("p", "r") for prompt in batch.prompts] if suffix != "txt" else []
        assert batch.responses == expected


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"q": ["a", "b"], "a": ["c", "d"]}), tmp_path / "x.parquet")
    data = ready(str(tmp_path / "x.parquet"), val_size=0, batch_size=2, prompt_column="q", response_column="a")
    assert sorted(data.train_rows) == [("a", "c", 0), ("b", "d", 1)]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        ready(str(tmp_path / "x.parquet"))


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return [{"prompt": f"{split}{i}"} for i in range(4)]

    datasets = ModuleType("datasets")
    datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    data = ready("owner/name", "owner/name", split="train", val_split="held", batch_size=2)
    assert set(asked) == {("owner/name", "train"), ("owner/name", "held")}
    assert data.val_rows[0][0] == "held0"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"no \.jsonl.*pip install datasets"):
        ready("owner/name")


def test_chat_and_conversations() -> None:
    data = ready(["a", "b"], val_size=0, chat=True, system="s", batch_size=2)
    assert data.train_rows[0][0] == [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data = ready([{"messages": turns}, {"prompt": turns[:1]}], val_size=0, batch_size=2)
    assert data.train_rows == [(turns[:1], "a", 0), (turns[:1], "", 1)]


def test_held_out_rows_are_disjoint_and_fixed() -> None:
    first, second = (ready([f"p{i}" for i in range(20)], val_size=5, seed=3, batch_size=2) for _ in range(2))
    assert first.val_rows == second.val_rows
    assert {row[2] for row in first.val_rows} | {row[2] for row in first.train_rows} == set(range(20))
    assert [batch.rows.tolist() for batch in first.val_dataloader()] == [
        [r[2] for r in first.val_rows][i : i + 2] for i in (0, 2, 4)
    ]


def test_word_game_follows_its_shares() -> None:
    data = WordGameDataModule(num_rows=2000, shares=(0.5, 0.2, 0.3, 0.0), val_size=10, batch_size=50, seed=1)
    data.setup("fit")
    words = [word for _, response, _ in data.train_rows for word in response.split()]
    shares = [sum(word[0] == letter for word in words) / len(words) for letter in "abcx"]
    assert shares == pytest.approx([0.5, 0.2, 0.3, 0.0], abs=0.02)
    assert {len(response.split()) for _, response, _ in data.train_rows} == set(range(3, 10))


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        (["a", " "], {}, ValueError, "row 1 has an empty prompt"),
        ([], {}, ValueError, "no prompts"),
        ([{"text": "a"}], {}, ValueError, "prompt_column"),
        ([[{"role": "assistant", "content": "a"}]], {}, ValueError, "empty prompt"),
        (["a"], {"val_size": 1}, ValueError, "val_size=1"),
        ("missing.jsonl", {}, FileNotFoundError, "missing.jsonl"),
    ],
)
def test_bad_rows(rows: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ready(rows, **{"val_size": 0, **options})


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="system='s'"):
        PromptDataModule(["a"], system="s")
    with pytest.raises(ValueError, match="batch_size=9"):
        ready(["a", "b"], val_size=0, batch_size=9).train_dataloader()
    with pytest.raises(ValueError, match="shares"):
        WordGameDataModule(shares=(0.5, 0.5, 0.5, 0.5))
