"""A small NashMP run that can kill itself; ``test_nash_mp.py`` starts it, one process per rank."""

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lit_methods.callbacks import ExactResume, SFTWarmup, WinRate
from lit_methods.datamodules import PromptDataModule
from lit_methods.llm import FunctionJudge, Generation, Loading, MirrorProx, NashMP, Prox
from tests.unit.llm.tiny import LLAMA, LORA, PROMPTS, WORDS, more_low_words

STEPS, SAVE_EVERY = 8, 3


class Watch(L.Callback):
    """Writes down what every rank sees and does."""

    def __init__(self, record: Path, kill_at: int | None) -> None:
        self.record = record
        self.kill_at = kill_at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        def total(name: str) -> str:
            return sum(float(whole(p).double().abs().sum()) for p in pl_module.player_parameters(name)).hex()

        step = {
            "step": trainer.global_step,
            "rows": batch.rows.tolist(),
            "draws": pl_module.last_responses,
            "policy": total("policy"),
            "target": total("target"),
            "val": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")},
        }
        with self.record.open("a") as file:
            file.write(json.dumps(step) + "\n")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


class Recording(NashMP):
    """Remembers its last draws."""

    last_responses: list[list[int]]

    def _draw(self, *arguments: Any) -> Any:
        drawn = super()._draw(*arguments)
        self.last_responses = drawn.tokens.tolist()
        return drawn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--mode", default="prox")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--sgd", action="store_true")
    parser.add_argument("--no-warmup", action="store_true")
    parser.add_argument("--saving", action="store_true", help="with what the recipe for many GPUs saves memory by")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--kill_at", type=int)
    parser.add_argument("--resume", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    L.seed_everything(1, verbose=False)
    module = Recording(
        LLAMA,
        FunctionJudge(more_low_words),
        {"words": WORDS},
        mode=MirrorProx(2) if args.mode == "mirror_prox" else Prox(),
        lora=None if args.full else LORA,
        generation=Generation(max_new_tokens=5),
        loading=Loading(gradient_checkpointing=args.saving, micro_batch_size=3 if args.saving else None),
        warmup_steps=3 if args.saving else 0,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05) if args.sgd else torch.optim.Adam(params, lr=3e-3),
    )
    rows = [{"prompt": f"{prompt} w{i}", "response": "w3 w4"} for prompt in PROMPTS for i in range(4)]
    checkpoint = ModelCheckpoint(args.folder, every_n_train_steps=SAVE_EVERY, save_last=True)
    watch = Watch(args.folder / f"rank{rank}.jsonl", args.kill_at)
    warmup = [] if args.no_warmup else [SFTWarmup(steps=3)]
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        strategy=ModelParallelStrategy(2, 1) if args.sharded else "ddp" if args.ranks > 1 else "auto",
        devices=args.ranks,
        use_distributed_sampler=False,
        val_check_interval=2,
        callbacks=[ExactResume(), *warmup, WinRate(), watch, checkpoint],
        gradient_clip_val=None if args.sgd and not args.saving else 1.0,
        precision=args.precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, PromptDataModule(rows, val_size=5, batch_size=2), ckpt_path=args.resume)
    trainer.save_checkpoint(args.folder / "final.ckpt")


if __name__ == "__main__":
    main()
