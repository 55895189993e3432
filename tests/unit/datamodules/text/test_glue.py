import sys
import types
from pathlib import Path

import pytest
import torch

from lit_methods.batches import TokenBatch
from lit_methods.datamodules import GLUEDataModule
from tests.standins.glue_files import WORDS, write_glue, write_tokenizer

PAD, UNK, CLS, SEP = 0, 1, 2, 3
IDS = {word: place + 5 for place, word in enumerate(WORDS)}

# One training row of every task as the official archives have it, and as (texts, label) should come out.
OFFICIAL = {
    "cola": ("CoLA", "train.tsv", "gj04\t1\t\tthe cat runs\n", ("the cat runs",), 1),
    "sst2": ("SST-2", "train.tsv", "sentence\tlabel\nthe cat runs \t0\n", ("the cat runs ",), 0),
    "mrpc": (
        "MRPC",
        "train.tsv",
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t70\t71\t"the cat\tthe dog\n',
        ('"the cat', "the dog"),
        1,
    ),
    "stsb": (
        "STS-B",
        "train.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tmain\tf\t2012\t1\tnone\tnone\tthe cat\tthe dog\t3.800\n",
        ("the cat", "the dog"),
        3.8,
    ),
    "qqp": (
        "QQP",
        "train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n9\t1\t2\tis it red\tis it\t1\n",
        ("is it red", "is it"),
        1,
    ),
    "mnli": (
        "MNLI",
        "train.tsv",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\t1n\tgov\t(\t(\t(\t(\tthe cat\tthe dog\tneutral\tcontradiction\n",
        ("the cat", "the dog"),
        2,
    ),
    "qnli": (
        "QNLI",
        "train.tsv",
        "index\tquestion\tsentence\tlabel\n0\tis it\tit is\tentailment\n",
        ("is it", "it is"),
        0,
    ),
    "rte": (
        "RTE",
        "train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tthe cat\tit\tnot_entailment\n",
        ("the cat", "it"),
        1,
    ),
    "wnli": ("WNLI", "train.tsv", "index\tsentence1\tsentence2\tlabel\n0\tthe cat\tit\t1\n", ("the cat", "it"), 1),
}
HUB_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def glue(folder: Path, task: str, **arguments) -> GLUEDataModule:
    return GLUEDataModule(task, str(folder / "tokenizer"), str(folder), **({"batch_size": 4} | arguments))


def encode(texts: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Tokens and their types by BERT's rule: [CLS] first [SEP] second [SEP]."""
    ids, types = [CLS], [0]
    for place, text in enumerate(texts):
        words = [IDS.get(word, UNK) for word in text.replace('"', '" ').split()]
        ids += [*words, SEP]
        types += [place] * (len(words) + 1)
    return ids, types


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("task", OFFICIAL)
def test_official_files(folder, task):
    archive, name, text, texts, label = OFFICIAL[task]
    write(folder / archive, name, text)
    write(folder / archive, "dev_matched.tsv" if task == "mnli" else "dev.tsv", text)
    data = glue(folder, task)
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    ids, types = encode(texts)
    assert isinstance(batch, TokenBatch)
    assert batch.input_ids.tolist() == [ids]
    assert batch.token_type_ids.tolist() == [types]
    assert batch.attention_mask.tolist() == [[1] * len(ids)]
    assert {tensor.dtype for tensor in batch[:3]} == {torch.int64}
    assert batch.labels.dtype == (torch.float32 if task == "stsb" else torch.int64)
    assert batch.labels.tolist() == pytest.approx([label])
    assert data.num_classes == {"stsb": None, "mnli": 3}.get(task, 2)


@pytest.mark.parametrize("task", HUB_COLUMNS)
def test_hub_columns(folder, task, monkeypatch):
    """What the package ``datasets`` would return, from a stand-in for it."""
    columns, texts = HUB_COLUMNS[task], ("the cat", "it is")[: len(HUB_COLUMNS[task])]
    label = 2.5 if task == "stsb" else 1
    asked = []

    class Table(dict):
        column_names = [*columns, "label", "idx"]  # noqa: RUF012

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return Table({name: [text] for name, text in zip(columns, texts, strict=True)} | {"label": [label], "idx": [0]})

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = glue(folder, task)
    data.prepare_data()
    data.setup("fit")
    validation = "validation_matched" if task == "mnli" else "validation"
    assert asked == [("nyu-mll/glue", task, split) for split in ("train", validation)] * 2
    (batch,) = data.val_dataloader()
    assert batch.input_ids.tolist() == [encode(texts)[0]]
    assert batch.labels.tolist() == [label]


@pytest.mark.parametrize("name", ["train-00000-of-00001.parquet", "train.parquet"])
def test_parquet_files(folder, name):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {"premise": ["the cat", "it"], "hypothesis": ["it is", "a dog"], "label": [2, 0], "idx": [0, 1]}
    (folder / "mnli").mkdir()
    parquet.write_table(pa.table(rows), folder / "mnli" / name)
    parquet.write_table(pa.table(rows), folder / "mnli" / "validation_mismatched-00000-of-00001.parquet")
    data = glue(folder, "mnli_mismatched")
    data.prepare_data()
    data.setup("fit")
    assert data.train_data.labels.tolist() == data.val_data.labels.tolist() == [2, 0]
    (batch,) = data.val_dataloader()
    assert batch.input_ids.tolist() == [encode(("the cat", "it is"))[0], [*encode(("it", "a dog"))[0], PAD][:7]]
    (folder / "mnli" / name).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is damaged or not a Parquet file"):
        glue(folder, "mnli").setup("fit")


def test_parquet_without_pyarrow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write(folder, "train.parquet", "PAR1")
    with pytest.raises(ModuleNotFoundError, match=r'train\.parquet needs pyarrow: pip install "lit-methods\[llm\]"'):
        glue(folder, "rte").setup("fit")


def test_no_transformers(folder, monkeypatch):
    write_glue(folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r'need transformers: pip install "lit-methods\[llm\]"'):
        glue(folder, "rte").setup("fit")


def test_batches_are_cut_to_their_longest_row_and_texts_to_max_length(folder):
    rows = [("the cat " * n, "it") for n in (1, 8, 2, 40)]
    write(
        folder / "RTE",
        "train.tsv",
        "sentence1\tsentence2\tlabel\n" + "".join(f"{a}\t{b}\tentailment\n" for a, b in rows),
    )
    write(folder / "RTE", "dev.tsv", (folder / "RTE" / "train.tsv").read_text())
    data = glue(folder, "rte", max_length=24, batch_size=1)
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert [batch.input_ids.shape[1] for batch in batches] == [6, 20, 8, 24]
    for (first, second), batch in zip(rows[:3], batches, strict=False):
        assert batch.input_ids[0].tolist() == encode((first, second))[0]
    assert batches[3].input_ids[0, -3:].tolist() == [SEP, IDS["it"], SEP], "the longer text is truncated"
    data.batch_size = 2
    (first, second) = data.val_dataloader()
    assert (first.attention_mask.sum(1).tolist(), second.attention_mask.sum(1).tolist()) == ([6, 20], [8, 24])
    assert first.input_ids[0, 6:].tolist() == [PAD] * 14


def test_matched_and_mismatched(folder):
    header = "sentence1\tsentence2\tgold_label\n"
    for name, label in (("train", "neutral"), ("dev_matched", "entailment"), ("dev_mismatched", "contradiction")):
        write(folder / "MNLI", f"{name}.tsv", f"{header}the cat\tit\t{label}\n")
    write(folder / "MNLI", "test_mismatched.tsv", "sentence1\tsentence2\nthe cat\tit\n")
    for task, label in (("mnli", 0), ("mnli_mismatched", 2)):
        data = glue(folder, task)
        data.setup("fit")
        assert data.train_data.labels.tolist() == [1]
        assert data.val_data.labels.tolist() == data.test_data.labels.tolist() == [label]
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch.labels.tolist() == [-1]


def test_evaluation_alone_does_not_tokenise_the_training_set(folder):
    write_glue(folder)
    data = glue(folder, "rte")
    data.setup("test")
    assert data.train_data is None
    assert len(data.test_data.labels) == 12


def test_missing_files_name_all_ways(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    data = glue(folder, "mnli")
    for step in (data.prepare_data, lambda: data.setup("fit")):
        with pytest.raises(FileNotFoundError) as error:
            step()
        for part in (
            str(folder / "MNLI" / "train.tsv"),
            str(folder / "mnli" / "train*.parquet"),
            "https://dl.fbaipublicfiles.com/glue/data/MNLI.zip",
            "nyu-mll/glue",
            "data_dir=",
            'pip install "datasets"',
        ):
            assert part in str(error.value), part


def test_hub_that_does_not_answer(folder, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(FileNotFoundError, match=r"lacks the train set of rte.*could not be loaded: no route to host"):
        glue(folder, "rte").prepare_data()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns .*; expected sentence1, sentence2"),
        ("index\tsentence1\tlabel\n0\tthe cat\tentailment\n", "has the columns .*; expected sentence1, sentence2"),
        ("sentence1\tsentence2\tlabel\n", "holds no rows"),
        ("sentence1\tsentence2\tlabel\nthe cat\tit\tmaybe\n", "row 0: the label is 'maybe'; expected entailment"),
        ("sentence1\tsentence2\tlabel\nthe cat\tit\t2\n", r"row 0: the label is '2'; expected .* or 0\.\.1"),
        ("sentence1\tsentence2\tlabel\nthe cat\tit\tnan\n", "the label is 'nan'"),
        ("sentence1\tsentence2\tlabel\nthe cat\tit\t0.5\n", r"the label is '0\.5'"),
        ("sentence1\tsentence2\tlabel\nthe cat\tit\t1\nit\n", "is damaged: 1 of 2 lines lack columns"),
    ],
)
def test_damaged_files_are_named(folder, text, message):
    write(folder / "RTE", "train.tsv", text)
    with pytest.raises(ValueError, match=message) as error:
        glue(folder, "rte").setup("fit")
    assert str(folder / "RTE" / "train.tsv") in str(error.value)


def test_binary_file_is_named(folder):
    (folder / "train.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"train\.tsv is damaged or not a text file"):
        glue(folder, "rte").setup("fit")


@pytest.mark.parametrize("score", ["-0.5", "5.1", "inf"])
def test_scores_out_of_range(folder, score):
    write(folder, "train.tsv", f"sentence1\tsentence2\tscore\nthe cat\tit\t{score}\n")
    with pytest.raises(ValueError, match=rf"the label is '{score}'; expected a number in \[0, 5\]"):
        glue(folder, "stsb").setup("fit")


def test_few_broken_lines_are_left_out_with_a_warning(folder):
    good = "1\t2\t3\tis it red\tis it\t0\n"
    write(folder / "QQP", "train.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n" + good * 150 + "7\t8\n")
    write(folder / "QQP", "dev.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n" + good)
    data = glue(folder, "qqp")
    with pytest.warns(UserWarning, match="left out 1 of 151 lines"):
        data.setup("fit")
    assert len(data.train_data.labels) == 150


def test_tokens_are_kept_small(folder):
    write_glue(folder)
    data = glue(folder, "rte", max_length=32)
    data.setup("fit")
    assert sum(tensor.element_size() for tensor in data.train_data[:3]) == 6
