"""Cases of the family: llm."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lit_methods.callbacks import (
    ExportHF,
    SampleTable,
    SFTWarmup,
    WinRate,
)
from lit_methods.datamodules import (
    GLUEDataModule,
    PromptDataModule,
    WordGameDataModule,
)
from lit_methods.llm import FunctionJudge, Generation, NashMP, SequenceClassification, SupervisedFineTuning
from lit_methods.llm.word_game import word_game_preference
from tests.contract.cases.kinds import (
    ADAM,
    LOADER_ARGUMENTS,
    CallbackCase,
    DataModuleCase,
    ModuleCase,
    RecipeCase,
    class_config,
)
from tests.standins.glue_files import write_glue
from tests.unit.llm.tiny import save_tiny_chat

_TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 33,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": 1,
}

_WORDS = {"words": [f"{letter}{i}" for letter, n in zip("pabcx", (5, 7, 7, 7, 5), strict=True) for i in range(n)]}


def _nash_mp(**arguments: Any) -> NashMP:
    judge = FunctionJudge(word_game_preference)
    return NashMP(
        **({"model": _TINY_LLAMA, "judge": judge, "tokenizer": _WORDS, "generation": Generation(4)} | arguments)
    )


_NO_FORWARD = {
    "check_compiles": "It samples and decodes texts and has no forward to capture.",
    "check_resumes_beside_averages_of_weights": (
        "It refuses SWA by name, which the check needs; tests/unit/llm/nash_mp resumes beside the other two."
    ),
}

_TINY_BERT = {
    "model_type": "bert",
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}

_LANGUAGE_MODELS_ONLY = {
    "check_attaches_to_an_unrelated_module": "It acts on language-model modules only, as its docstring says.",
    "check_state_survives_a_checkpoint": "The same; tests/unit/callbacks/llm/test_llm_callbacks.py covers its state.",
}


def _glue(folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_glue(folder)
    tokenizer = str(folder / "tokenizer")
    return GLUEDataModule(
        **({"task": "rte", "tokenizer": tokenizer, "data_dir": str(folder), "batch_size": 4} | arguments)
    )


def _prompts(folder: Path, **arguments: Any) -> LightningDataModule:
    rows = [f"prompt {i}" for i in range(40)]
    return PromptDataModule(rows, **({"batch_size": 4, "val_size": 6} | arguments))


def _word_game(folder: Path, **arguments: Any) -> LightningDataModule:
    return WordGameDataModule(**({"num_rows": 40, "batch_size": 4, "val_size": 6} | arguments))


MODULES: dict[str, ModuleCase] = {
    "lit_methods.llm.NashMP": ModuleCase(
        may_be_infinite=frozenset({"eta"}),
        config={
            "model": class_config(
                "lit_methods.llm.NashMP",
                model=_TINY_LLAMA,
                tokenizer=_WORDS,
                judge=class_config(
                    "lit_methods.llm.FunctionJudge", function="lit_methods.llm.word_game.word_game_preference"
                ),
                generation={"max_new_tokens": 4},
                warmup_steps=2,
                optimizer=ADAM,
            ),
            "data": class_config("lit_methods.datamodules.WordGameDataModule", num_rows=64, val_size=8, batch_size=4),
        },
        make=_nash_mp,
        forward_inputs=tuple,
        bad=[
            (lambda: _nash_mp(beta=0.0), "beta must be"),
            (lambda: _nash_mp(eta=-1.0), "eta must be"),
            (lambda: _nash_mp(samples_per_prompt=1), "samples_per_prompt must be"),
        ],
        not_applicable=_NO_FORWARD,
    ),
    "lit_methods.llm.SupervisedFineTuning": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.llm.SupervisedFineTuning",
                model=_TINY_LLAMA,
                tokenizer=_WORDS,
                generation={"max_new_tokens": 4},
                optimizer=ADAM,
            ),
            "data": class_config("lit_methods.datamodules.WordGameDataModule", num_rows=64, val_size=8, batch_size=4),
        },
        make=lambda: SupervisedFineTuning(_TINY_LLAMA, _WORDS),
        forward_inputs=tuple,
        bad=[(lambda: SupervisedFineTuning(_TINY_LLAMA), "tokenizer must be")],
        not_applicable=_NO_FORWARD,
    ),
    "lit_methods.llm.SequenceClassification": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.llm.SequenceClassification",
                model=_TINY_BERT,
                metrics=["accuracy", "f1", "matthews"],
                warmup=0.1,
                optimizer=class_config("lit_methods.optim.MFAC", lr=1e-2, num_grads=4, damping=1e-3),
            ),
            "data": class_config(
                "lit_methods.datamodules.GLUEDataModule", task="rte", tokenizer="tokenizer", data_dir=".", batch_size=4
            ),
        },
        make=lambda: SequenceClassification(_TINY_BERT),
        forward_inputs=lambda: (torch.arange(8).view(2, 4), torch.ones(2, 4).long(), torch.zeros(2, 4).long()),
        bad=[
            (lambda: SequenceClassification(_TINY_BERT, num_labels=1), "num_labels must be"),
            (lambda: SequenceClassification(_TINY_BERT, warmup=1.0), "warmup must be"),
            (lambda: SequenceClassification(_TINY_BERT, metrics=["pearson"]), "metrics must name"),
            (lambda: SequenceClassification({"hidden_size": 8}), "model has no model_type"),
        ],
        prepare=write_glue,
    ),
}


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.PromptDataModule": DataModuleCase(_prompts, bad=LOADER_ARGUMENTS),
    "lit_methods.datamodules.WordGameDataModule": DataModuleCase(_word_game, bad=LOADER_ARGUMENTS),
    "lit_methods.datamodules.GLUEDataModule": DataModuleCase(
        _glue,
        bad=[
            *LOADER_ARGUMENTS[:3],
            ({"task": "squad"}, "task='squad': must be one of cola"),
            ({"max_length": 0}, "max_length=0: must be"),
        ],
    ),
}


CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.ExportHF": CallbackCase(ExportHF, bad=[], not_applicable=_LANGUAGE_MODELS_ONLY),
    "lit_methods.callbacks.SFTWarmup": CallbackCase(
        SFTWarmup, bad=[(lambda: SFTWarmup(steps=0), "steps must be")], not_applicable=_LANGUAGE_MODELS_ONLY
    ),
    "lit_methods.callbacks.SampleTable": CallbackCase(
        SampleTable,
        bad=[(lambda: SampleTable(num_prompts=0), "num_prompts and max_characters must be")],
        not_applicable=_LANGUAGE_MODELS_ONLY,
    ),
    "lit_methods.callbacks.WinRate": CallbackCase(
        WinRate, bad=[(lambda: WinRate(confidence=2.0), "confidence must be")], not_applicable=_LANGUAGE_MODELS_ONLY
    ),
}


_TWO_SHORT_EPOCHS = [
    "--trainer.max_steps=4", "--trainer.max_epochs=2", "--trainer.limit_train_batches=2",
    "--trainer.val_check_interval=1",
]  # fmt: skip

RECIPES: dict[str, RecipeCase] = {
    "nash_mp/matrix_games": RecipeCase(["--model.num_iterations=3", "--trainer.max_epochs=2"]),
    "nash_mp/smollm2_vader": RecipeCase(
        [
            *_TWO_SHORT_EPOCHS,
            "--trainer.accelerator=cpu",
            "--model.generation.max_new_tokens=4",
            "--model.judge.init_args.score=tests.unit.llm.tiny.number_of_words",
        ],
        prepare=lambda folder: save_tiny_chat(folder / "smollm2"),
    ),
    "nash_mp/tiny_intransitive": RecipeCase([*_TWO_SHORT_EPOCHS, "--data.num_rows=64", "--data.val_size=4"]),
}
