"""Prompts for language models from JSONL, Parquet or text files, from a list, or from the hub."""

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
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")


class PromptDataModule(LightningDataModule):
    """Batches of prompts, and of wanted responses where there are any; see :class:`~lit_methods.batches.PromptBatch`.

    A row is a text, or a mapping with the column ``prompt`` (a text, or a list of chat messages) or ``messages`` (a
    conversation: its last assistant turn becomes the response), and optionally ``response``. Prompts are disjoint
    between ranks, and a resumed run continues at the very next prompt (set ``trainer.use_distributed_sampler: false``).

    Args:
        train: a ``.jsonl``, ``.json``, ``.parquet`` or ``.txt`` file (one prompt a line), a list of rows, or the name
            of a data set on the hub.
        val: the same for held-out prompts; ``None`` holds out ``val_size`` rows of ``train``.
        val_size: held-out rows when ``val`` is ``None``; 0 for no validation.
        chat: turn text prompts into chat messages of one user turn.
        system: system message put in front of every chat prompt.
        prompt_column: name of the prompt's column.
        response_column: name of the response's column.
        split: split of a hub data set that ``train`` reads.
        val_split: split of a hub data set that ``val`` reads.
        batch_size: prompts per training batch and rank.
        val_batch_size: prompts per validation batch and rank; default ``batch_size``.
        num_workers: loader processes.
        seed: seed of the held-out rows and of the order.

    Raises:
        ValueError: for an argument outside its range, empty data, empty prompts, or rows of unknown form.
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
        response_column: str = "response",
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
            if isinstance(source, str) and not source.endswith(SUFFIXES):
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
            raw = _read_file(Path(source)) if source.endswith(SUFFIXES) else _load_hub(source, split)
        else:
            raw = source
        if not len(raw):
            raise ValueError(f"{source!r} holds no prompts")
        return [(*self._parse(row, index), index) for index, row in enumerate(raw)]

    def _parse(self, row: Any, index: int) -> tuple[Prompt, str]:
        response = ""
        prompt: Any = row
        if isinstance(row, dict):
            response = row.get(self.response_column) or ""
            prompt = row.get(self.prompt_column, row.get("messages"))
            if prompt is None:
                raise ValueError(
                    f"row {index} has columns {sorted(row)} but neither {self.prompt_column!r} nor 'messages'; "
                    "set prompt_column"
                )
        if isinstance(prompt, Sequence) and not isinstance(prompt, str):
            turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in prompt]
            if turns and turns[-1]["role"] == "assistant":
                response = response or turns[-1]["content"]
                turns = turns[:-1]
            if not turns or not turns[-1]["content"].strip():
                raise ValueError(f"row {index} has an empty prompt")
            return turns, response
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"row {index} has an empty prompt: {row!r:.80}")
        if not self.chat:
            return prompt, response
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*turns, {"role": "user", "content": prompt}], response


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


def _read_file(path: Path) -> Sequence[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give a .jsonl, .json, .parquet or .txt file of prompts")
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Parquet files need pyarrow: pip install pyarrow") from error
        return parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    lines = [line for line in text.splitlines() if line.strip()]
    return lines if path.suffix == ".txt" else [json.loads(line) for line in lines]


def _load_hub(name: str, split: str) -> Sequence[Any]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name!r} is no {'/'.join(SUFFIXES)} file, and reading it from the hub needs: pip install datasets"
        ) from error
    return load_dataset(name, split=split)
