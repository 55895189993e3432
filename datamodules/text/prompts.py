"""Prompts for language models from JSONL, Parquet or text files, from a list, or from the hub."""

import csv
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.utils.data import Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.batches import Prompt, PromptBatch
from lit_methods.datamodules.tensors import ShuffledSampler, UnrepeatedSampler, check_int

Row = tuple[Prompt, str, int]
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")


class PromptDataModule(LightningDataModule):
    """Batches of prompts, and of wanted responses where there are any; see :class:`~lit_methods.batches.PromptBatch`.

    A row is a text, or a mapping with the column ``prompt`` (a text, or a list of chat messages) or ``messages`` (a
    conversation: its last assistant turn becomes the response), and optionally ``response``. A message has a ``role``
    and a ``content``: a text, or a list of text parts, which are joined. Its further fields, such as ``tool_calls``, go
    to the chat template as they are. Prompts are disjoint between ranks, and a resumed run continues at the very next
    prompt (set ``trainer.use_distributed_sampler: false`` and add
    :class:`~lit_methods.callbacks.ExactResume`).

    Args:
        train: a ``.jsonl``, ``.json`` (a list of rows), ``.parquet``, ``.csv`` (with a header) or ``.txt`` file (one
            prompt a line), a list of rows, or the name of a data set on the hub.
        val: the same for held-out prompts; ``None`` holds out ``val_size`` rows of ``train``.
        val_size: held-out rows when ``val`` is ``None``; 0 for no validation.
        chat: turn text prompts into chat messages of one user turn.
        system: system message put in front of every chat prompt that does not begin with one of its own.
        prompt_column: name of the prompt's column.
        response_column: name of the response's column; ``None`` to ignore responses. Where some rows have one, all
            must.
        split: split of a hub data set that ``train`` reads.
        val_split: split of a hub data set that ``val`` reads.
        batch_size: prompts per training batch and rank.
        val_batch_size: prompts per validation batch and rank; default ``batch_size``.
        num_workers: loader processes.
        seed: seed of the held-out rows and of the order.

    Raises:
        ValueError: for an argument outside its range, empty data, or a row that is not understood; names file and row.
        FileNotFoundError: if a file is missing.
    """

    def __init__(
        self,
        train: str | list[Any],
        val: str | list[Any] | None = None,
        val_size: int = 64,
        chat: bool = False,
        system: str | None = None,
        prompt_column: str = "prompt",
        response_column: str | None = "response",
        split: str = "train",
        val_split: str = "test",
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if system is not None and not chat:
            raise ValueError(f"Invalid system={system!r}: plain prompts have no system message; set chat=True.")
        self.train = train
        self.val = val
        self.val_size = check_int("val_size", val_size, 0)
        self.chat = chat
        self.system = system
        self.prompt_column = prompt_column
        self.response_column = response_column
        self.split = split
        self.val_split = val_split
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.val_batch_size = batch_size if val_batch_size is None else check_int("val_batch_size", val_batch_size, 1)
        self.num_workers = check_int("num_workers", num_workers, 0)
        self.seed = check_int("seed", seed, 0)
        self.train_rows: list[Row] = []
        self.val_rows: list[Row] = []

    def prepare_data(self) -> None:
        """Download hub data sets; files are left where they are."""
        for source, split in ((self.train, self.split), (self.val, self.val_split)):
            if isinstance(source, str) and not _is_file(source):
                _load_hub(source, split)

    def setup(self, stage: str) -> None:
        """Read the rows and hold some out."""
        if self.train_rows:
            return
        rows = self._read(self.train, self.split)
        if self.val is not None:
            self.val_rows = self._read(self.val, self.val_split)
        elif self.val_size:
            if self.val_size >= len(rows):
                raise ValueError(f"Invalid val_size={self.val_size}: must be < {len(rows)}, the rows of train.")
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
            self.val_rows = [rows[index] for index in sorted(order[: self.val_size])]
            rows = [rows[index] for index in sorted(order[self.val_size :])]
        self.train_rows = rows

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled prompts; this rank's share. Rows that fill no batch are left out, others each epoch."""
        world_size, rank = self._ranks()
        if len(self.train_rows) // world_size < self.batch_size:
            raise ValueError(
                f"Invalid batch_size={self.batch_size}: must be <= {len(self.train_rows) // world_size}, the training "
                "rows of each rank."
            )
        rows = _Rows(self.train_rows)
        sampler = ShuffledSampler(rows, world_size, rank, shuffle=True, seed=self.seed, drop_last=True)
        if self.trainer is not None:  # loader processes fetch ahead before the Trainer says which epoch it resumes
            epochs: Any = self.trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(epochs.processed)
        return self._loader(rows, sampler, self.batch_size, drop_last=True)

    def val_dataloader(self) -> StatefulDataLoader | list[StatefulDataLoader]:
        """Held-out prompts in order; this rank's share. Each once, unless the model is sharded over the ranks.

        Ranks that share a model must take equally many steps: there, the first prompts are repeated at the end.
        """
        if not self.val_rows:
            return []
        rows = _Rows(self.val_rows)
        sharded = self.trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy)
        world_size, rank = self._ranks()
        sampler: DistributedSampler[Row] = UnrepeatedSampler(rows, world_size, rank)
        if sharded:
            sampler = DistributedSampler(rows, world_size, rank, shuffle=False)
        return self._loader(rows, sampler, self.val_batch_size, drop_last=False)

    def test_dataloader(self) -> StatefulDataLoader | list[StatefulDataLoader]:
        """The held-out prompts."""
        return self.val_dataloader()

    def predict_dataloader(self) -> StatefulDataLoader | list[StatefulDataLoader]:
        """The held-out prompts."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, int]:
        """What a resumed run must share with the run that wrote the checkpoint."""
        return {"batch_size": self.batch_size, "seed": self.seed, "train_size": len(self.train_rows)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Refuse to resume training with settings that would change the order of the prompts."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        now = self.state_dict()
        changes = ", ".join(f"{key}={old} (now {now[key]})" for key, old in state_dict.items() if old != now[key])
        if changes:
            raise ValueError(f"The checkpoint was written with {changes}: resume with the old values.")

    def _ranks(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(
        self, rows: "_Rows", sampler: DistributedSampler[Row], batch_size: int, drop_last: bool
    ) -> StatefulDataLoader:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital'")  # torchdata 0.11 calls what torch 2.13 deprecates
            return StatefulDataLoader(
                rows,
                batch_size=batch_size,
                sampler=sampler,
                num_workers=self.num_workers,
                collate_fn=collate_prompts,
                drop_last=drop_last,
                generator=torch.Generator().manual_seed(self.seed),  # else each epoch draws from the global generator
            )

    def _read(self, source: str | list[Any], split: str) -> list[Row]:
        if isinstance(source, str):
            name, raw = source, _read_file(Path(source)) if _is_file(source) else _load_hub(source, split)
        else:
            name, raw = "the list of prompts", source
        if isinstance(raw, (dict, str)) or not hasattr(raw, "__len__"):
            raise ValueError(f"{name} must hold a list of rows, got {_kind(raw)}")
        if not len(raw):
            raise ValueError(f"{name} holds no prompts")
        rows = []
        for index, row in enumerate(raw):
            try:
                rows.append((*self._parse(row), index))
            except ValueError as error:
                raise ValueError(f"{name}, row {index} (the first is 0): {error}") from error
        with_response = [index for _, response, index in rows if response]
        if with_response and len(with_response) < len(rows):
            without = next(index for _, response, index in rows if not response)
            raise ValueError(
                f"{name}, row {without} (the first is 0) has no response, but row {with_response[0]} has one: give all "
                "rows a response, or none (response_column=None ignores them)"
            )
        return rows

    def _parse(self, row: Any) -> tuple[Prompt, str]:
        response: Any = None
        prompt: Any = row
        if isinstance(row, dict):
            response = None if self.response_column is None else row.get(self.response_column)
            prompt = row.get(self.prompt_column, row.get("messages"))
            if prompt is None:
                raise ValueError(
                    f"it has columns {sorted(map(str, row))} but no value under {self.prompt_column!r} or 'messages'; "
                    "set prompt_column"
                )
        if response is not None and not isinstance(response, str):
            raise ValueError(f"a response must be a text, got {_kind(response)}")
        if isinstance(prompt, list | tuple):
            turns = [_message(turn) for turn in prompt]
            if turns and turns[-1]["role"] == "assistant":
                if self.response_column is not None:
                    response = response or turns[-1]["content"]
                turns = turns[:-1]
        elif isinstance(prompt, str):
            turns = [{"role": "user", "content": prompt}]
        else:
            raise ValueError(f"a prompt must be a text or a list of messages, got {_kind(prompt)}")
        if not turns or not (turns[-1]["content"].strip() or turns[-1].get("tool_calls")):
            raise ValueError("it has an empty prompt")
        if isinstance(prompt, str) and not self.chat:
            return prompt, response or ""
        if self.system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        return turns, response or ""


class _Rows(Dataset[Row]):
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def collate_prompts(rows: list[Row]) -> PromptBatch:
    """A batch from rows (prompt, response, index)."""
    prompts, responses, index = zip(*rows, strict=True)
    return PromptBatch(list(prompts), list(responses) if any(responses) else [], torch.tensor(index))


def _message(turn: Any) -> dict[str, Any]:
    """One chat message whose content is a text."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise ValueError(f"a message must be a mapping with a role and a content, got {turn!r:.80}")
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        others = [part for part in content if not isinstance(part, dict) or not isinstance(part.get("text"), str)]
        if others:
            raise ValueError(f"the content of a message may have parts of text only, got {others[0]!r:.80}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the content of a message must be a text or a list of text parts, got {_kind(content)}")
    return {**turn, "content": content}


def _kind(value: Any) -> str:
    """What something is, for messages."""
    keys = f" with the keys {sorted(map(str, value))[:5]}" if isinstance(value, dict) else ""
    return f"{type(value).__name__}{keys or f' {value!r:.60}'}"


def _is_file(source: str) -> bool:
    """Whether a source is a file of prompts rather than a data set on the hub.

    Raises:
        ValueError: for an existing file of unknown form.
    """
    if source.lower().endswith(SUFFIXES):
        return True
    if Path(source).is_file():
        raise ValueError(
            f"{source} must be a file that ends in one of {', '.join(SUFFIXES)}, got {Path(source).suffix!r}"
        )
    return False


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give one of prompts that ends in {', '.join(SUFFIXES)}")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Parquet files need pyarrow: pip install pyarrow") from error
        try:
            return parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:  # what pyarrow raises is both or either
            raise ValueError(f"{path} is no readable Parquet file: {error}") from error
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not encoded in UTF-8: {error}") from error
    if suffix == ".csv":
        return _read_csv(path, text)
    if suffix == ".json":
        return _parse_json(text, str(path))
    # Not splitlines(): it also breaks at U+2028 and its kin, which may stand within a line of JSON or of text.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".txt":
        return [line for _, line in lines]
    return [_parse_json(line, f"{path}, line {number}") for number, line in lines]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def _read_csv(path: Path, text: str) -> list[dict[str, str]]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    for index, row in enumerate(rows):
        if None in row or None in row.values():  # what DictReader makes of too many and of too few cells
            raise ValueError(f"{path}, row {index} (the first is 0) must have as many cells as the header, got {row}")
    return rows


def _load_hub(name: str, split: str) -> Sequence[Any]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name!r} is no {'/'.join(SUFFIXES)} file, and reading it from the hub needs: pip install datasets"
        ) from error
    return load_dataset(name, split=split)
