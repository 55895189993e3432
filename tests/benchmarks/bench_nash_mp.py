"""Nash Prox and its relatives against TRL's online trainers: same model, judge and number of generated responses.

Two games, each training in a process of its own, one after the other in an order that rotates with the seed:

- ``tiny``: every method starts from the same supervised tiny Llama and plays the intransitive word game of the recipe
  ``nash_mp/tiny_intransitive``: 200 steps of 128 responses, Adam 1e-3, beta 0.03, clipping at 1.
- ``larger``: a random Llama of 4 layers and width 256, prompts of 64 tokens and responses of 32, for speed and memory.

TRL's trainers take scalar rewards only; theirs is the mean win probability within the group of a prompt, under the same
judge. Time is the process's CPU time of training on one thread, without evaluation (wall time means little on a shared
machine). Memory is the peak of the resident set during training, above what it was when training began, with all models
loaded: activations, gradients, optimizer states, key-value caches.

Run ``python -m tests.benchmarks.bench_nash_mp`` in an environment with this package and ``trl==1.16.0`` (optional).
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_methods.callbacks import SFTWarmup
from lit_methods.callbacks.llm.export_hf import ExportHF
from lit_methods.datamodules import PromptDataModule, WordGameDataModule
from lit_methods.llm import FunctionJudge, Generation, MirrorProx, NashMP, Prox
from lit_methods.llm.judges import query_judge
from lit_methods.llm.language_model import LanguageModel, load_tokenizer
from lit_methods.llm.loading import load_causal_lm
from lit_methods.llm.word_game import word_game_preference
from tests.benchmarks import harness

BETA, LR, CLIP = 0.03, 1e-3, 1.0
JUDGE = FunctionJudge(word_game_preference)
PURE = {letter: " ".join(f"{letter}{i}" for i in range(6)) for letter in "abc"}
WORDS = [f"{letter}{i}" for letter, n in zip("pabcx", (5, 7, 7, 7, 5), strict=True) for i in range(n)]
LLAMA = {
    "model_type": "llama", "vocab_size": 33, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "bos_token_id": None,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LARGER = {
    **LLAMA, "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
NUM_RESPONSES = {"tiny": 128, "larger": 32}
MAX_TOKENS = {"tiny": 10, "larger": 32}
OURS: dict[str, dict[str, Any]] = {
    "Nash Prox (group)": {"eta": 0.25},
    "Nash Prox (separate opponent)": {"eta": 0.25, "mode": Prox(opponent="policy")},
    "Nash-MP mirror_prox": {"eta": 0.25, "mode": MirrorProx(10)},
    "self-play (eta=inf)": {"eta": math.inf},
    "Nash-MD-PG (mixture 0.125)": {"eta": math.inf, "mode": Prox(opponent="mixture")},
    "best response to reference": {"eta": math.inf, "mode": Prox(opponent="reference")},
}
BASELINE = "Nash Prox (group)"
THEIRS = ("TRL OnlineDPO (ipo)", "TRL RLOO", "TRL GRPO")


def prompts(game: str, seed: int) -> PromptDataModule:
    """The prompts of a game."""
    if game == "tiny":
        return WordGameDataModule(seed=seed)
    words = torch.randint(4094, (512, 64), generator=torch.Generator().manual_seed(seed)).tolist()
    return PromptDataModule([" ".join(f"x{word}" for word in row) for row in words], val_size=8, seed=seed)


class Evaluation:
    """Win rates of a policy on held-out prompts with fixed seeds, and how long measuring them took."""

    def __init__(self, folder: str, data: PromptDataModule) -> None:
        self.module = nash(folder, generation=Generation(MAX_TOKENS["tiny"]))
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


class Counting(NashMP):
    """Counts the tokens that it draws."""

    tokens = 0

    def _sample(self, *arguments: Any) -> torch.Tensor:
        responses = super()._sample(*arguments)
        self.tokens += int(self._response_mask(responses).sum())
        return responses


def nash(folder: str, **options: Any) -> Counting:
    return Counting(
        folder, JUDGE, beta=BETA, optimizer=lambda params: torch.optim.Adam(params, lr=LR, fused=True), **options
    )


def start_model(game: str, folder: str, seed: int) -> None:
    """The model that everybody starts from: supervised in the tiny game, random in the larger one."""
    L.seed_everything(seed, verbose=False)
    if game == "larger":
        load_causal_lm(LARGER).save_pretrained(folder)
        load_tokenizer({"words": [f"x{word}" for word in range(4094)]}).save_pretrained(folder)
        return
    module = NashMP(LLAMA, JUDGE, {"words": WORDS})
    trainer = quiet_trainer(0, [SFTWarmup(steps=300)])
    trainer.fit(module, WordGameDataModule(seed=seed))
    ExportHF().export(module, folder)


def quiet_trainer(steps: int, callbacks: list[Any]) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", max_steps=steps, gradient_clip_val=CLIP, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
        callbacks=callbacks,
    )  # fmt: skip


class Run:
    """One training: evaluates every so many steps, and measures CPU time without evaluation, and memory."""

    def __init__(self, game: str, folder: str, seed: int, steps: int, every: int) -> None:
        self.game, self.folder, self.seed, self.steps, self.every = game, folder, seed, steps, every
        L.seed_everything(seed, verbose=False)
        self.data = prompts(game, seed)
        self.data.setup("fit")
        self.evaluation = Evaluation(folder, self.data) if game == "tiny" else None
        self.tokens = 0

    def watch(self, step: int, lm: Any) -> None:
        if self.evaluation is not None and step % self.every == 0:
            self.evaluation(lm)

    def measure(self, train: Callable[[], object]) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident_mib("VmRSS")
        start = time.process_time()
        train()
        self.seconds = time.process_time() - start - (0.0 if self.evaluation is None else self.evaluation.seconds)
        self.peak = resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def run_ours(name: str, run: Run) -> None:
    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            run.watch(batch_idx + 1, module.policy.lm)

    num = 4 if _has_separate_opponent(name) else 8
    run.data.batch_size = NUM_RESPONSES[run.game] // 8
    module = nash(run.folder, samples_per_prompt=num, generation=Generation(MAX_TOKENS[run.game]), **OURS[name])
    module.configure_model()
    trainer = quiet_trainer(run.steps, [Watch()])
    run.measure(lambda: trainer.fit(module, run.data))
    run.tokens = module.tokens


def run_theirs(name: str, run: Run) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    def win_rates(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """Mean win probability against the other completions of the same prompt in this batch."""
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        run.tokens += sum(min(longest, len(text.split()) + 1) for text in texts)
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
            run.watch(state.global_step, model)

    size, longest = 2 if "DPO" in name else 8, MAX_TOKENS[run.game]
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": run.steps,
        "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": CLIP, "weight_decay": 0.0,
        "seed": run.seed, "save_strategy": "no", "logging_steps": 10_000, "disable_tqdm": True, "temperature": 1.0,
        "gradient_checkpointing": False,
    }  # fmt: skip
    rows = Dataset.from_list([{"prompt": row[0]} for row in run.data.train_rows])
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    shared = {"processing_class": tokenizer, "train_dataset": rows, "callbacks": [Watch()], "reward_funcs": win_rates}
    if "DPO" in name:
        args = OnlineDPOConfig(
            **common,
            beta=BETA,
            loss_type="ipo",
            max_new_tokens=longest,
            per_device_train_batch_size=NUM_RESPONSES[run.game] // 2,
        )
        trainer = OnlineDPOTrainer(model=load_causal_lm(run.folder), args=args, **shared)
    else:
        config, kind = (RLOOConfig, RLOOTrainer) if "RLOO" in name else (GRPOConfig, GRPOTrainer)
        extra = {} if "RLOO" in name else {"scale_rewards": "none"}
        args = config(
            **common, beta=BETA, num_generations=8, max_completion_length=longest,
            per_device_train_batch_size=NUM_RESPONSES[run.game], **extra,
        )  # fmt: skip
        trainer = kind(model=run.folder, args=args, **shared)
    run.measure(trainer.train)


def one(name: str, game: str, folder: str, seed: int, steps: int) -> dict[str, float]:
    """Train once; what was seen."""
    run = Run(game, folder, seed, steps, every=20)
    (run_ours if name in OURS else run_theirs)(name, run)
    share = 0.5 if _has_separate_opponent(name) else 1.0
    seen = {"generated": run.tokens / run.seconds, "trained": share * run.tokens / run.seconds, "peak": run.peak}
    if run.evaluation is None:
        return seen
    half = run.evaluation.points[len(run.evaluation.points) // 2 :]
    wins, worst = ([point[key] for point in half] for key in ("reference", "worst"))
    return seen | {
        "win": statistics.mean(wins), "std": statistics.pstdev(wins), "min": min(wins),
        "worst": statistics.mean(worst), "worst_min": min(worst), "junk": half[-1]["junk"],
    }  # fmt: skip


def compare(game: str, steps: int, seeds: list[int], names: list[str]) -> None:
    """The table of methods over all seeds, one process per training."""
    collected: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn, seed in enumerate(seeds):
        shift = turn * 2 % len(names)
        with tempfile.TemporaryDirectory() as folder:
            start_model(game, folder, seed)
            for name in names[shift:] + names[:shift]:
                options = ["--one", name, "--game", game, "--folder", folder, "--seeds", seed, "--steps", steps]
                command = [sys.executable, "-m", "tests.benchmarks.bench_nash_mp", *map(str, options)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                collected[name].append(json.loads(output.splitlines()[-1]))
                sys.stderr.write(f"{game}, seed {seed}, {name}: {collected[name][-1]}\n")
        write(game, collected, steps)


def write(game: str, collected: dict[str, list[dict[str, float]]], steps: int) -> None:
    """Save the table of what has run so far."""
    base = collected[BASELINE]
    rows: list[harness.Row] = []
    for name, runs in collected.items():
        speed = sorted(ours["generated"] / run["generated"] for run, ours in zip(runs, base, strict=True))
        row: harness.Row = {"method": name}
        if game == "tiny":
            row |= {
                "win rate vs reference": spread(runs, "win"),
                "its std over the last half": spread(runs, "std"),
                "worst case vs pure a/b/c": spread(runs, "worst"),
                "lowest worst case": round(min(run["worst_min"] for run in runs), 3),
                "junk": round(statistics.mean(run["junk"] for run in runs), 3),
            }
        row |= {
            "generated tokens per CPU second": round(statistics.median(run["generated"] for run in runs)),
            "trained tokens per CPU second": round(statistics.median(run["trained"] for run in runs)),
            "speed of Nash Prox relative to it": [round(value, 2) for value in (statistics.median(speed), *speed)],
            "peak MiB": round(statistics.median(run["peak"] for run in runs)),
            "seeds": len(runs),
            "steps": steps,
        }
        rows.append(row)
    harness.save("nash_mp", f"{game}_same_number_of_responses", rows, ("transformers", "lightning", "trl"))


def _has_separate_opponent(name: str) -> bool:
    return name in OURS and "mode" in OURS[name]


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
    parser.add_argument("--game", choices=["tiny", "larger"], help="only this one")
    parser.add_argument("--steps", type=int, help="default: 200 in the tiny game, 10 in the larger one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", choices=[*OURS, *THEIRS], nargs="+", help=f"{BASELINE!r} and others; default: all")
    parser.add_argument("--head", choices=["nothing", "plain", "chunked"])
    parser.add_argument("--only-head", action="store_true")
    parser.add_argument("--one", choices=[*OURS, *THEIRS], help="a single training")
    parser.add_argument("--folder", help="the model that a single training starts from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.head:
        one_head(arguments.head)
    elif arguments.one:
        seen = one(arguments.one, arguments.game, arguments.folder, arguments.seeds[0], arguments.steps)
        print("\n" + json.dumps(seen))
    else:
        if not arguments.game:
            head_memory()
        names = arguments.methods or [*OURS, *(THEIRS if harness.peer("trl") is not None else ())]
        for game in () if arguments.only_head else [arguments.game] if arguments.game else ["larger", "tiny"]:
            compare(game, arguments.steps or {"tiny": 200, "larger": 10}[game], arguments.seeds, names)


if __name__ == "__main__":
    main()
