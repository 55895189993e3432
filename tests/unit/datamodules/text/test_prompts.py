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
    data = ready([{"messages": turns}, {"prompt": turns[:1], "response": "b"}], val_size=0, batch_size=2)
    assert data.train_rows == [(turns[:1], "a", 0), (turns[:1], "b", 1)]
    data = ready([{"messages": turns}, {"prompt": turns[:1]}], val_size=0, batch_size=2, response_column=None)
    assert data.train_rows == [(turns[:1], "", 0), (turns[:1], "", 1)]


def test_content_of_text_parts_is_joined_and_tool_calls_stay() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    calls = [{"function": {"name": "f", "arguments": {}}}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "name": "f", "content": "3"},
    ]
    data = ready([{"messages": turns}], val_size=0, batch_size=1)
    assert data.train_rows[0][0] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "f", "content": "3"},
    ]


def test_system_message_goes_before_messages_that_have_none() -> None:
    user, own = {"role": "user", "content": "q"}, {"role": "system", "content": "own"}
    data = ready([[user], {"prompt": [own, user]}, "q"], val_size=0, batch_size=1, chat=True, system="s")
    system = {"role": "system", "content": "s"}
    assert [row[0] for row in data.train_rows] == [[system, user], [own, user], [system, user]]


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\x85d", "e\x0bf", "g\u2029h"]
    (tmp_path / "x.jsonl").write_text(
        "\ufeff" + "\r\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts), encoding="utf-8"
    )
    (tmp_path / "x.txt").write_text("\ufeff" + "\n".join(texts), encoding="utf-8")
    for suffix in ("jsonl", "txt"):
        data = ready(str(tmp_path / f"x.{suffix}"), val_size=0, batch_size=1)
        assert [row[0] for row in data.train_rows] == texts


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "x.CSV").write_text('\ufeffid,prompt,response\n007,"a, b\nc",r\n008,d,s\n', encoding="utf-8")
    data = ready(str(tmp_path / "x.CSV"), val_size=0, batch_size=1)
    assert data.train_rows == [("a, b\nc", "r", 0), ("d", "s", 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', r"x\.jsonl, line 3 is no JSON"),
        ("x.jsonl", b"[" * 100_000, r"x\.jsonl, line 1 is no JSON"),
        ("x.json", b'{"prompt": ["a"]}', r"x\.json must hold a list of rows, got dict with the keys \['prompt'\]"),
        ("x.json", b'"a"', r"x\.json must hold a list of rows, got str"),
        ("x.json", b"[", r"x\.json is no JSON"),
        ("x.txt", b"\xff\xfe", r"x\.txt is not encoded in UTF-8"),
        ("x.parquet", b"PAR1", r"x\.parquet is no readable Parquet file"),
        ("x.csv", b"prompt,response\na\n", r"x\.csv, row 0 .* as many cells"),
        ("x.csv", b"prompt\na,b\n", r"x\.csv, row 0 .* as many cells"),
        ("x.tsv", b"prompt\na\n", r"x\.tsv must be a file that ends in one of \.jsonl"),
        ("x.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt": "a"}', r"x\.jsonl, row 1 .* has no response, but"),
        (
            "x.jsonl",
            b'{"prompt": {"role": "user"}}',
            "a prompt must be a text or a list of messages, got dict",
        ),
        ("x.jsonl", b"3", r"row 0 .*a prompt must be a text or a list of messages, got int 3"),
        ("x.jsonl", b'{"prompt": "a", "response": ["b"]}', r"row 0 .*a response must be a text, got list"),
        ("x.jsonl", b'{"messages": [{"content": "a"}]}', r"row 0 .*a message must be a mapping with a role"),
        ("x.jsonl", b'{"messages": ["a"]}', r"row 0 .*a message must be a mapping with a role"),
        (
            "x.jsonl",
            b'{"messages": [{"role": "user", "content": null}]}',
            "must be a text or a list of text parts",
        ),
        (
            "x.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
            "may have parts of text only, got .*image_url",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_file_and_row(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ready(str(tmp_path / name), val_size=0, batch_size=1)


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
        (["a", " "], {}, ValueError, "row 1 .*empty prompt"),
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
