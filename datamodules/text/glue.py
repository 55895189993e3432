"""The nine GLUE tasks, from their official TSV files, Parquet files or the hub, as tokens."""

import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from lit_methods.batches import TokenBatch
from lit_methods.datamodules.reading import check_unpacked_size, reading
from lit_methods.datamodules.tensors import TensorDataModule, check_int

Split = Literal["train", "validation", "test"]
Rows = tuple[list[tuple[str, ...]], list[Any]]

_HUB = "nyu-mll/glue"
_ZIPS = "https://dl.fbaipublicfiles.com/glue/data/"
_CHUNK = 10_000


class _Task(NamedTuple):
    name: str  # on the hub
    zip: str  # name of the official archive and of the folder in it
    columns: tuple[str, ...]  # of the texts
    labels: tuple[str, ...]  # names of the classes, in the hub's order; none for regression
    tsv_columns: tuple[str, ...]
    tsv_label: str
    suffix: str = ""  # of the evaluation splits' files


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = _Task(
    "mnli", "MNLI", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), _PAIR, "gold_label"
)
_TASKS = {
    "cola": _Task("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), ("sentence",), "label"),
    "sst2": _Task("sst2", "SST-2", ("sentence",), ("negative", "positive"), ("sentence",), "label"),
    "mrpc": _Task("mrpc", "MRPC", _PAIR, ("not_equivalent", "equivalent"), ("#1 String", "#2 String"), "Quality"),
    "stsb": _Task("stsb", "STS-B", _PAIR, (), _PAIR, "score"),
    "qqp": _Task(
        "qqp", "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), ("question1", "question2"),
        "is_duplicate",
    ),
    "mnli": _MNLI._replace(suffix="_matched"),
    "mnli_mismatched": _MNLI._replace(suffix="_mismatched"),
    "qnli": _Task("qnli", "QNLI", ("question", "sentence"), _ENTAILMENT, ("question", "sentence"), "label"),
    "rte": _Task("rte", "RTE", _PAIR, _ENTAILMENT, _PAIR, "label"),
    "wnli": _Task("wnli", "WNLI", _PAIR, ("not_entailment", "entailment"), _PAIR, "label"),
}  # fmt: skip
_COLA_WITHOUT_HEADER = ["source", "label", "star", "sentence"]


class GLUEDataModule(TensorDataModule):
    """One task of GLUE, General Language Understanding Evaluation (Wang et al., 2018, arXiv 1804.07461).

    Batches are :class:`~lit_methods.batches.TokenBatch`. Class indices follow the hub's data sets:

    ========== =============================== =================================================
    task       texts                           labels
    ========== =============================== =================================================
    cola       sentence                        0 unacceptable, 1 acceptable
    sst2       sentence                        0 negative, 1 positive
    mrpc       sentence1, sentence2            0 not equivalent, 1 equivalent
    stsb       sentence1, sentence2            similarity, float32 in [0, 5]
    qqp        question1, question2            0 not duplicate, 1 duplicate
    mnli       premise, hypothesis             0 entailment, 1 neutral, 2 contradiction
    qnli       question, sentence              0 entailment, 1 not entailment
    rte        sentence1, sentence2            0 entailment, 1 not entailment
    wnli       sentence1, sentence2            0 not entailment, 1 entailment
    ========== =============================== =================================================

    ``mnli`` is evaluated on its matched part and ``mnli_mismatched`` (the same training set) on the other. GLUE
    withholds the labels of its test sets, so its development set serves for validation and for testing, as is usual;
    a checkpoint that was chosen on it has an optimistic score there. Prediction runs over GLUE's test set, in order.

    Each split comes from ``data_dir/<archive>``, ``data_dir/<task>`` or ``data_dir`` itself, as ``train.tsv``,
    ``dev.tsv`` and ``test.tsv`` (the official archives; MRPC as GLUE's download script leaves it) or as ``train``,
    ``validation`` and ``test`` in ``.parquet`` files (the hub's, ``train-00000-of-00001.parquet`` and the like); MNLI's
    have ``_matched`` or ``_mismatched`` in their names. A split that is not there is loaded through the package
    ``datasets``, from its cache or the hub.

    Texts are tokenised once, in :meth:`setup` (some minutes for the largest tasks), truncated to ``max_length`` tokens
    (the longer of two texts first) and kept padded, in 6 bytes per token; each batch is cut to its longest row.

    Args:
        task: a name in the table, or ``mnli_mismatched``.
        tokenizer: folder or hub id of a ``transformers`` tokenizer with a padding token.
        data_dir: see above.
        max_length: largest number of tokens of a row, >= 1.
        batch_size: rows per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the sample order, >= 0.

    Raises:
        ValueError: for an argument out of range, or a file that is damaged or not what its name says.
        FileNotFoundError: when files are missing and the hub does not help; says which, where, and how to get them.
        ModuleNotFoundError: when ``transformers`` is missing, or ``pyarrow`` for Parquet files.
    """

    def __init__(
        self,
        task: str,
        tokenizer: str,
        data_dir: str = "data/glue",
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, transform=_cut)
        if task not in _TASKS:
            raise ValueError(f"Invalid task={task!r}: must be one of {', '.join(_TASKS)}.")
        self.task = task
        self.tokenizer = tokenizer
        self.data_dir = data_dir
        self.max_length = check_int("max_length", max_length, 1)
        self.num_classes = len(_TASKS[task].labels) or None
        self.predict_data: TokenBatch | None = None

    def prepare_data(self) -> None:
        """Fetch from the hub what ``data_dir`` lacks."""
        splits: list[Split] = ["train", "validation"]
        for split in splits:
            if not self._files(split):
                self._load_hub(split)

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits of ``stage``, each once."""
        if stage == "predict":
            self.predict_data = self.predict_data or self._encode("test")
            return
        if stage == "fit" and self.train_data is None:
            self.train_data = self._encode("train")
        if self.val_data is None:
            self.val_data = self.test_data = self._encode("validation")

    def predict_dataloader(self) -> Any:
        """Return a loader over this rank's share of GLUE's test set, whose labels are -1."""
        return self._eval_loader(self.predict_data)

    def _encode(self, split: Split) -> TokenBatch:
        texts, labels = self._read(split)
        tokenizer = _load_tokenizer(self.tokenizer)
        chunks = []
        for start in range(0, len(texts), _CHUNK):
            tokens = tokenizer(
                *map(list, zip(*texts[start : start + _CHUNK], strict=True)),
                truncation=True,
                max_length=self.max_length,
                padding="max_length",
                padding_side="right",
                return_attention_mask=True,
                return_token_type_ids=True,
                return_tensors="np",
            )
            names = (("input_ids", np.int32), ("attention_mask", np.uint8), ("token_type_ids", np.uint8))
            chunks.append([torch.from_numpy(tokens[name].astype(dtype)) for name, dtype in names])
        label_type = torch.float32 if self.num_classes is None else torch.int64
        input_ids, attention_mask, token_type_ids = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return TokenBatch(input_ids, attention_mask, token_type_ids, torch.tensor(labels, dtype=label_type))

    def _read(self, split: Split) -> Rows:
        task, files = _TASKS[self.task], self._files(split)
        if not files:
            return _parse_table(self._load_hub(split), task, f"{_HUB} {task.name}")
        texts: list[tuple[str, ...]] = []
        labels: list[Any] = []
        for file in files:
            rows = _read_tsv(file, task) if file.suffix == ".tsv" else _read_parquet(file, task)
            texts += rows[0]
            labels += rows[1]
        return texts, labels

    def _files(self, split: Split) -> list[Path]:
        task, root = _TASKS[self.task], Path(self.data_dir)
        for folder in (root / task.zip, root / task.name, root):
            for stem in _stems(split, task):
                for pattern in (f"{stem}.tsv", f"{stem}.parquet", f"{stem}-*.parquet"):
                    if found := sorted(folder.glob(pattern)):
                        return found
        return []

    def _load_hub(self, split: Split) -> dict[str, list[Any]]:
        task = _TASKS[self.task]
        try:
            from datasets import load_dataset
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                self._how_to_get_files(split, 'Or, with a network: pip install "datasets"')
            ) from error
        try:
            table = load_dataset(_HUB, task.name, split=split if split == "train" else split + task.suffix)
        except Exception as error:  # the hub's client has no common base class for what can go wrong
            reason = f"The hub's {_HUB} could not be loaded: {error}"
            raise FileNotFoundError(self._how_to_get_files(split, reason)) from error
        return {name: list(table[name]) for name in table.column_names}

    def _how_to_get_files(self, split: Split, reason: str) -> str:
        task, root = _TASKS[self.task], Path(self.data_dir).absolute()
        stems = _stems(split, task)
        tsv, parquet = f"{stems[0]}.tsv", f"{stems[-1]}*.parquet"
        return (
            f"GLUEDataModule lacks the {split} set of {self.task}: {root / task.zip / tsv} or "
            f"{root / task.name / parquet}. Unpack {_ZIPS}{task.zip}.zip into {root}, or copy the Parquet files of "
            f"{task.name} from the hub's {_HUB}, or pass data_dir=<the folder that holds either>. {reason}"
        )


def _stems(split: Split, task: _Task) -> tuple[str, ...]:
    """Names of a split's file, without the ending."""
    if split == "train":
        return ("train",)
    names = ("dev", "validation") if split == "validation" else ("test",)
    return tuple(name + task.suffix for name in names)


def _read_tsv(path: Path, task: _Task) -> Rows:
    """Read one file; quotes mean nothing in GLUE, and lines that lack columns (QQP has some) are left out."""
    with reading(path, "a text file"), path.open(encoding="utf-8-sig", newline="\n") as file:
        header, *lines = [line.rstrip("\r\n").split("\t") for line in file if line.strip()] or [[]]
    if task.name == "cola" and "sentence" not in header and len(header) == len(_COLA_WITHOUT_HEADER):
        header, lines = _COLA_WITHOUT_HEADER, [header, *lines]
    names = next((names for names in (task.columns, task.tsv_columns) if set(names) <= set(header)), None)
    if names is None:
        expected = " or ".join(", ".join(names) for names in dict.fromkeys((task.columns, task.tsv_columns)))
        raise ValueError(f"{path} has the columns {header}; expected {expected}.")
    label = next((name for name in (task.tsv_label, "label") if name in header), None)
    used = [*names] if label is None else [*names, label]
    places = [header.index(name) for name in used]
    whole = [line for line in lines if max(places) < len(line)]
    if len(whole) < 0.99 * len(lines):
        raise ValueError(f"{path} is damaged: {len(lines) - len(whole)} of {len(lines)} lines lack columns.")
    if len(whole) < len(lines):
        warnings.warn(f"{path}: left out {len(lines) - len(whole)} of {len(lines)} lines, which lack columns.")
    columns = {name: [line[place] for line in whole] for name, place in zip(used, places, strict=True)}
    table = dict(zip(task.columns, (columns[name] for name in names), strict=True))
    if label is not None:
        table["label"] = columns[label]
    return _parse_table(table, task, str(path))


def _read_parquet(path: Path, task: _Task) -> Rows:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{path} needs pyarrow: pip install "lit-methods[llm]"') from error
    with reading(path, "a Parquet file"):
        metadata = parquet.read_metadata(path)
        groups = (metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        check_unpacked_size(path, path.stat().st_size, max(sum(groups), 8 * metadata.num_rows))
        table = parquet.read_table(path).to_pydict()
    return _parse_table(table, task, str(path))


def _parse_table(table: dict[str, list[Any]], task: _Task, where: str) -> Rows:
    """Return texts and labels of a table with the hub's column names; labels are names, numbers or not there."""
    if lacking := [name for name in task.columns if name not in table]:
        raise ValueError(f"{where} has the columns {list(table)} and lacks {', '.join(lacking)}.")
    texts = list(zip(*(table[name] for name in task.columns), strict=True))
    if not texts:
        raise ValueError(f"{where} holds no rows.")
    for number, row in enumerate(texts):
        if not all(isinstance(text, str) for text in row):
            raise ValueError(f"{where}, row {number}: a text is missing.")
    labels = table.get("label", [-1] * len(texts))
    return texts, [_parse_label(label, task, f"{where}, row {row}") for row, label in enumerate(labels)]


def _parse_label(label: Any, task: _Task, where: str) -> int | float:
    if label in task.labels:
        return task.labels.index(label)
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = float("nan")
    allowed = range(-1, len(task.labels))
    if not (value in allowed if task.labels else value == -1 or 0 <= value <= 5):
        expected = ", ".join(task.labels) + f" or 0..{len(task.labels) - 1}" if task.labels else "a number in [0, 5]"
        raise ValueError(f"{where}: the label is {label!r}; expected {expected}.")
    return int(value) if task.labels else value


def _load_tokenizer(tokenizer: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('tokenised texts need transformers: pip install "lit-methods[llm]"') from error
    return AutoTokenizer.from_pretrained(tokenizer)


def _cut(batch: TokenBatch) -> TokenBatch:
    """Widen the stored integers and cut the padding that no row of the batch needs."""
    length = int(batch.attention_mask.any(0).sum())
    input_ids, attention_mask, token_type_ids = (tensor[:, :length].long() for tensor in batch[:3])
    return TokenBatch(input_ids, attention_mask, token_type_ids, batch.labels)
