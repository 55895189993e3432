"""Nash Prox and its relatives against TRL's online trainers: same model, judge and number of generated responses.

Every method starts from the same supervised tiny Llama and plays the intransitive word game of the recipe
``nash_mp/tiny_intransitive``: 200 steps of 128 responses, Adam 1e-3, beta 0.03, clipping at 1. TRL's trainers take
scalar rewards only; theirs is the mean win probability within the group of a prompt, under the same judge. Time is the
process's CPU time of training on one thread, without evaluation (wall time means little on a shared machine); the
methods of a seed run one after the other in an order that rotates.

Run ``python -m tests.benchmarks.bench_nash_mp`` in an environment with this package and ``trl==1.16.0`` (optional).
"""

import argparse
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import lightning as L
import torch

from lit_methods.callbacks import SFTWarmup
from lit_methods.callbacks.export_hf import ExportHF
from lit_methods.datamodules import WordGameDataModule
from lit_methods.llm import FunctionJudge, NashMP
from lit_methods.llm.judges import query_judge
from lit_methods.llm.language_model import LanguageModel, load_causal_lm
from lit_methods.llm.word_game import word_game_preference
from tests.benchmarks import harness

BETA, LR, CLIP, NUM_RESPONSES, MAX_TOKENS = 0.03, 1e-3, 1.0, 128, 10
JUDGE = FunctionJudge(word_game_preference)
PURE = {letter: " ".join(f"{letter}{i}" for i in range(6)) for letter in "abc"}
WORDS = [f"{letter}{i}" for letter, n in zip("pabcx", (5, 7, 7, 7, 5), strict=True) for i in range(n)]
LLAMA = {
    "model_type": "llama", "vocab_size": 33, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "bos_token_id": None,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
OURS: dict[str, dict[str, Any]] = {
    "Nash Prox (group)": {"eta": 0.25, "samples_per_prompt": 8},
    "Nash Prox (separate opponent)": {"eta": 0.25, "samples_per_prompt": 4, "opponent": "policy"},
    "Nash-MP mirror_prox": {"eta": 0.25, "samples_per_prompt": 4, "mode": "mirror_prox", "inner_steps": 10},
    "self-play (eta=inf)": {"eta": math.inf, "samples_per_prompt": 8},
    "Nash-MD-PG (mixture 0.125)": {"eta": math.inf, "samples_per_prompt": 4, "opponent": "mixture"},
    "best response to reference": {"eta": math.inf, "samples_per_prompt": 4, "opponent": "reference"},
}
THEIRS = ("TRL OnlineDPO (ipo)", "TRL RLOO", "TRL GRPO")


class Evaluation:
    """Win rates of a policy on held-out prompts with fixed seeds, and how long measuring them took."""

    def __init__(self, folder: str, data: WordGameDataModule) -> None:
        self.module = nash(folder)
        self.module.configure_model()
        self.prompts = [row[0] for row in data.val_rows]
        self.reference = self.module.respond(self.prompts, "reference", seed=1)[0]
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0

    def __call__(self, lm: Any) -> None:
        start = time.process_time()
        training = lm.training
        self.module.policy = LanguageModel(lm)
        texts = self.module.respond(self.prompts, seed=2)[0]
        lm.train(training)
        rates = {name: self.against(texts, [text] * len(texts)) for name, text in PURE.items()}
        words = [word for text in texts for word in text.split()]
        point = {
            "reference": self.against(texts, self.reference),
            "worst": min(rates.values()),
            "junk": sum(word[0] not in "abc" for word in words) / max(1, len(words)),
        }
        self.points.append(point)
        self.seconds += time.process_time() - start

    def against(self, texts: list[str], others: list[str]) -> float:
        return float(query_judge(JUDGE, self.prompts, texts, others).mean())


def nash(folder: str, **options: Any) -> NashMP:
    return NashMP(
        folder,
        JUDGE,
        beta=BETA,
        max_new_tokens=MAX_TOKENS,
        optimizer=lambda params: torch.optim.Adam(params, lr=LR, fused=True),
        **options,
    )


def supervised_start(folder: str, seed: int) -> None:
    """The model that everybody starts from."""
    L.seed_everything(seed, verbose=False)
    module = NashMP(LLAMA, JUDGE, {"words": WORDS}, max_new_tokens=MAX_TOKENS)
    trainer = quiet_trainer(0, [SFTWarmup(steps=300)])
    trainer.fit(module, WordGameDataModule(seed=seed))
    ExportHF().export(module, folder)


def quiet_trainer(steps: int, callbacks: list[Any]) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", max_steps=steps, gradient_clip_val=CLIP, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
        callbacks=callbacks,
    )  # fmt: skip


def run_ours(name: str, folder: str, data: WordGameDataModule, steps: int, every: int) -> tuple[Evaluation, float, int]:
    evaluation = Evaluation(folder, data)
    tokens = 0

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            nonlocal tokens
            tokens += round(float(trainer.callback_metrics["train/length/mean"]) * len(batch.prompts) * num)
            if (batch_idx + 1) % every == 0:
                evaluation(module.policy.lm)

    options = OURS[name]
    num = options["samples_per_prompt"]
    data.batch_size = 16
    module = nash(folder, **options)
    trainer = quiet_trainer(steps, [Watch()])
    start = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - start - evaluation.seconds
    return evaluation, seconds, tokens


def run_theirs(
    name: str, folder: str, data: WordGameDataModule, steps: int, every: int, seed: int
) -> tuple[Evaluation, float, int]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    evaluation = Evaluation(folder, data)
    tokens = 0

    def win_rates(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """Mean win probability against the other completions of the same prompt in this batch."""
        nonlocal tokens
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        tokens += sum(min(MAX_TOKENS, len(text.split()) + 1) for text in texts)
        groups: dict[tuple[str, int], list[int]] = {}
        seen: dict[str, int] = {}
        for i, prompt in enumerate(prompts):  # a prompt drawn twice makes groups of the same prompt: fill one by one
            group = seen.get(prompt, 0)
            groups.setdefault((prompt, group // size), []).append(i)
            seen[prompt] = group + 1
        rewards = [0.5] * len(texts)
        for rows in groups.values():
            for i in rows:
                others = [j for j in rows if j != i]
                if others:
                    pairs = [word_game_preference("", texts[i], texts[j]) for j in others]
                    rewards[i] = sum(pairs) / len(pairs)
        return rewards

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step % every == 0:
                evaluation(model)

    size = 2 if "DPO" in name else 8
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": steps,
        "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": CLIP, "weight_decay": 0.0, "seed": seed,
        "save_strategy": "no", "logging_steps": 10_000, "disable_tqdm": True, "temperature": 1.0,
        "gradient_checkpointing": False,
    }  # fmt: skip
    rows = Dataset.from_list([{"prompt": row[0]} for row in data.train_rows])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shared = {"processing_class": tokenizer, "train_dataset": rows, "callbacks": [Watch()], "reward_funcs": win_rates}
    if "DPO" in name:
        args = OnlineDPOConfig(
            **common,
            beta=BETA,
            loss_type="ipo",
            max_new_tokens=MAX_TOKENS,
            per_device_train_batch_size=NUM_RESPONSES // 2,
        )
        trainer = OnlineDPOTrainer(model=load_causal_lm(folder), args=args, **shared)
    else:
        config, kind = (RLOOConfig, RLOOTrainer) if "RLOO" in name else (GRPOConfig, GRPOTrainer)
        extra = {} if "RLOO" in name else {"scale_rewards": "none"}
        args = config(
            **common, beta=BETA, num_generations=8, max_completion_length=MAX_TOKENS,
            per_device_train_batch_size=NUM_RESPONSES, **extra,
        )  # fmt: skip
        trainer = kind(model=folder, args=args, **shared)
    start = time.process_time()
    trainer.train()
    return evaluation, time.process_time() - start - evaluation.seconds, tokens


def compare(steps: int, seeds: list[int], every: int = 20, save_as: str = "same_number_of_responses") -> None:
    """The table of all methods over all seeds."""
    peers = THEIRS if harness.peer("trl") is not None else ()
    names = [*OURS, *peers]
    collected: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn, seed in enumerate(seeds):
        with tempfile.TemporaryDirectory() as folder:
            supervised_start(folder, seed)
            for name in names[turn:] + names[:turn]:
                L.seed_everything(seed, verbose=False)
                data = WordGameDataModule(seed=seed)
                data.setup("fit")
                if name in OURS:
                    evaluation, seconds, tokens = run_ours(name, folder, data, steps, every)
                else:
                    evaluation, seconds, tokens = run_theirs(name, folder, data, steps, every, seed)
                half = evaluation.points[len(evaluation.points) // 2 :]
                wins, worst = ([point[key] for point in half] for key in ("reference", "worst"))
                row = {
                    "win": statistics.mean(wins), "std": statistics.pstdev(wins), "min": min(wins),
                    "worst": statistics.mean(worst), "worst_min": min(worst), "junk": half[-1]["junk"],
                    "trained": tokens / seconds,
                    "generated": tokens * (2 if _has_separate_opponent(name) else 1) / seconds,
                }  # fmt: skip
                collected[name].append(row)
                sys.stderr.write(f"seed {seed} {name}: {row}\n")
        write(collected, steps, save_as)


def write(collected: dict[str, list[dict[str, float]]], steps: int, save_as: str) -> None:
    """Save the table of what has run so far."""
    base = collected["Nash Prox (group)"]
    rows = []
    for name, runs in collected.items():
        speed = [run["generated"] / ours["generated"] for run, ours in zip(runs, base, strict=True)]
        rows.append(
            {
                "method": name,
                "win rate vs reference": spread(runs, "win"),
                "its std over the last half": spread(runs, "std"),
                "worst case vs pure a/b/c": spread(runs, "worst"),
                "lowest worst case": round(min(run["worst_min"] for run in runs), 3),
                "junk": round(statistics.mean(run["junk"] for run in runs), 3),
                "generated tokens per CPU second": round(statistics.median(run["generated"] for run in runs)),
                "trained tokens per CPU second": round(statistics.median(run["trained"] for run in runs)),
                "generated tokens per CPU second, ratio to Nash Prox": [round(min(speed), 2), round(max(speed), 2)],
            }
        )
    packages = ("transformers", "lightning", "trl")
    harness.save("nash_mp", save_as, [{**row, "seeds": len(base), "steps": steps} for row in rows], packages)


def _has_separate_opponent(name: str) -> bool:
    return name in OURS and OURS[name]["samples_per_prompt"] == 4


def spread(runs: list[dict[str, float]], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def head_memory() -> None:
    """Peak memory of log-probabilities of 2048 tokens in a vocabulary of 49152, hidden size 576, with gradients."""
    rows = []
    for kind in ("nothing", "plain", "chunked"):
        command = [sys.executable, "-m", "tests.benchmarks.bench_nash_mp", "--head", kind]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, seconds = map(float, output.split())
        rows.append({"head": kind, "peak MiB": round(peak), "seconds": round(seconds, 2)})
    for row in rows:
        row["MiB above nothing"] = row["peak MiB"] - rows[0]["peak MiB"]
    harness.save("nash_mp", "head_memory", rows)


def one_head(kind: str) -> None:
    from lit_methods.llm.logprobs import Head, chunked_logprobs

    hidden = torch.randn(2048, 576, requires_grad=True)
    weight = torch.randn(49152, 576)
    targets = torch.randint(49152, (2048,))
    start = time.process_time()
    if kind == "plain":
        logits = (hidden @ weight.T).log_softmax(-1)
        logits.gather(1, targets.unsqueeze(1)).sum().backward()
    elif kind == "chunked":
        chunked_logprobs(hidden, Head(weight), targets, chunk_size=256)[0].sum().backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(peak, time.process_time() - start)


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--head", choices=["nothing", "plain", "chunked"])
    parser.add_argument("--only-head", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.head:
        one_head(arguments.head)
        return
    head_memory()
    if not arguments.only_head:
        compare(arguments.steps, arguments.seeds)


if __name__ == "__main__":
    main()
