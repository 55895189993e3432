import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor

from lit_methods.batches import PromptBatch
from lit_methods.callbacks import ExportHF
from lit_methods.datamodules import PromptDataModule
from lit_methods.llm import FunctionJudge, Generation, Loading, LocalSampler, MirrorProx, NashMP, Prox, Reference
from lit_methods.llm.logprobs import response_mask
from lit_methods.llm.nash_mp.preferences import Drawn, ask_preferences
from tests.unit.llm.tiny import LLAMA, LORA, PROMPTS, WORDS, more_low_words, save_tiny

BATCH = PromptBatch(list(PROMPTS), [], torch.arange(len(PROMPTS)))


def build(**options: Any) -> NashMP:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "tokenizer": {"words": WORDS},
        "generation": Generation(max_new_tokens=6),
        "optimizer": lambda params: torch.optim.Adam(params, lr=3e-3),
    }
    model = NashMP(options.pop("model", LLAMA), FunctionJudge(more_low_words), **{**defaults, **options})
    model.configure_model()
    return model


def trainer(folder: Path, steps: int, **options: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "max_steps": steps,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            **options,
        }
    )


def prompts(**options: Any) -> PromptDataModule:
    return PromptDataModule(list(PROMPTS) * 3, val_size=4, **{"batch_size": 4, **options})


def weights(module: NashMP, player: str) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.player_parameters(player)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def drawn_tokens(length: int = 4) -> Drawn:
    """Random responses of full length to ``PROMPTS``."""
    tokens = torch.randint(2, 20, (len(PROMPTS), length))
    return Drawn(tokens, torch.ones_like(tokens, dtype=torch.bool), [], torch.zeros(len(PROMPTS), dtype=torch.bool))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"lora": LORA},
    {"mode": MirrorProx(2)},
    {"mode": MirrorProx(2), "lora": LORA},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_players_are_equal_at_the_start(options: dict[str, Any]) -> None:
    module = build(**options)
    encoded = module.encode(list(PROMPTS))
    responses = drawn_tokens()
    with torch.no_grad():
        policy = module.score("policy", encoded, responses)[0]
        for name in ("reference", *module.frozen_players):
            assert torch.equal(module.score(name, encoded, responses)[0], policy), name


@pytest.mark.parametrize("lora", [None, LORA])
def test_adapters_and_copies_are_isolated(lora: dict[str, Any] | None) -> None:
    module = build(lora=lora, mode="mirror_prox")
    names = ["reference", "target", "opponent"]
    encoded = module.encode(list(PROMPTS))
    responses = drawn_tokens()

    def scores(name: str) -> Tensor:
        with torch.no_grad():
            return module.score(name, encoded, responses)[0]

    start = {name: scores(name) for name in ["policy", *names]}
    with torch.no_grad():
        for parameter in module.player_parameters("policy"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for name in names:
        assert torch.equal(scores(name), start[name]), name
    assert (scores("policy") - start["policy"]).abs().max() > 0.1  # the reference is not the policy in disguise
    module.move_player("target")
    assert torch.equal(scores("target"), scores("policy"))
    assert torch.equal(scores("opponent"), start["opponent"])
    assert torch.equal(scores("reference"), start["reference"])


@pytest.mark.parametrize("options", VARIANTS)
def test_only_the_policy_is_trained_whatever_players_were_used(options: dict[str, Any]) -> None:
    module = build(**options)
    expected = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    trained = {id(parameter) for parameter in module.player_parameters("policy")}
    assert {id(parameter) for parameter in module.parameters() if parameter.requires_grad} == trained
    optimizer = module.configure_optimizers()
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    module.training_step(BATCH, 0).backward()
    assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == expected
    for parameter in module.parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained)


def test_frozen_players_refuse_gradients_and_come_back_after_errors() -> None:
    module = build(lora=LORA)
    with pytest.raises(RuntimeError, match="no_grad"), module.player("reference"):
        pass
    with pytest.raises(KeyError), torch.no_grad(), module.player("target"):
        raise KeyError
    assert module.policy is not None
    assert module.policy.lm.active_adapter == "default"
    assert all(parameter.requires_grad for parameter in module.player_parameters("policy"))


def test_players_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match=r"no player 'target' with mode=Prox\(.*\) and eta=inf"):
        build(eta=math.inf).respond(PROMPTS, "target")
    with pytest.raises(ValueError, match="no player 'opponent'"):
        build(lora=LORA).respond(PROMPTS, "opponent")


def test_target_is_the_moving_average_of_the_policy(tmp_path: Path) -> None:
    for lora in (None, LORA):
        module = build(mode=Prox(kappa=0.25), lora=lora)
        start = weights(module, "target")
        trainer(tmp_path, 1).fit(module, prompts())
        for old, new, policy in zip(start, weights(module, "target"), weights(module, "policy"), strict=True):
            torch.testing.assert_close(new, 0.75 * old + 0.25 * policy)
        assert not equal(start, weights(module, "target"))


def test_kappa_one_makes_the_target_the_policy(tmp_path: Path) -> None:
    module = build(mode=Prox(kappa=1.0))
    trainer(tmp_path, 3).fit(module, prompts())
    assert equal(weights(module, "target"), weights(module, "policy"))
    torch.manual_seed(0)
    with torch.no_grad():
        encoded = module.encode(list(PROMPTS))
        drawn = drawn_tokens()
        ratio = module.score("policy", encoded, drawn)[0] - module.score("target", encoded, drawn)[0]
    assert ratio.abs().max() == 0


def test_infinite_eta_is_self_play_without_a_target(tmp_path: Path) -> None:
    module = build(eta=math.inf)
    assert "target" not in module.frozen
    trainer(tmp_path, 2).fit(module, prompts())
    # a huge finite eta with the same draws takes the same steps
    other = build(eta=1e12)
    trainer(tmp_path, 2).fit(other, prompts())
    for one, two in zip(weights(module, "policy"), weights(other, "policy"), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_warm_up_begins_with_a_part_of_the_learning_rate() -> None:
    module = build(warmup_steps=4)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    found = []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"] / 3e-3)
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_targets_move_once_per_optimizer_step_under_accumulation(tmp_path: Path) -> None:
    module = build(mode=Prox(copy_every=2))
    targets: list[bool] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.before = weights(module, "target")

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            targets.append(not equal(self.before, weights(module, "target")))

    trainer(tmp_path, 4, accumulate_grad_batches=2, callbacks=[Watch()]).fit(module, prompts(batch_size=2))
    assert targets == [False, False, False, True] * 2
    assert module.inner_step == 4
    assert module.batches_seen == 8


def test_a_skipped_optimizer_step_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    optimizer = module.configure_optimizers()
    parent = "lightning.pytorch.core.module.LightningModule.optimizer_step"
    monkeypatch.setattr(parent, lambda self, epoch, batch_idx, optimizer, closure: None)  # what a GradScaler does
    module.optimizer_step(0, 0, optimizer, lambda: None)
    assert module.inner_step == 0
    monkeypatch.setattr(parent, lambda self, epoch, batch_idx, optimizer, closure: optimizer.step())
    module.optimizer_step(0, 0, optimizer, lambda: None)
    assert module.inner_step == 1


@pytest.mark.parametrize("lora", [None, LORA])
def test_mirror_prox_phases(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    module = build(mode=MirrorProx(2), lora=lora)
    center = weights(module, "target")
    history: list[tuple[Any, ...]] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            history.append((module.opponents()[0][0][0], module.phase))

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            states[batch_idx] = {name: weights(module, name) for name in ("policy", "target", "opponent")}

    states: dict[int, Any] = {}
    trainer(tmp_path, 5, callbacks=[Watch()]).fit(module, prompts())
    assert history == [("target", 0), ("target", 0), ("opponent", 1), ("opponent", 1), ("target", 0)]
    assert equal(states[1]["opponent"], states[1]["policy"])  # pi_{k+1/2} is frozen
    assert equal(states[2]["opponent"], states[1]["policy"])
    assert equal(states[2]["target"], center)  # the centre stays in both phases
    assert equal(states[3]["target"], states[3]["policy"])
    assert not equal(states[3]["target"], center)


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("options", [{}, {"mode": MirrorProx(2)}])
def test_resumes_to_the_bit(tmp_path: Path, lora: dict[str, Any] | None, options: dict[str, Any]) -> None:
    def run(seed: int, checkpoint: Path | None) -> NashMP:
        module = build(lora=lora, **options)
        torch.manual_seed(seed)  # the global generator must not matter
        keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        fit = trainer(tmp_path, 7, callbacks=[keep], enable_checkpointing=True)
        fit.fit(module, prompts(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return module

    whole = run(1, None)
    resumed = run(2, tmp_path / "step=3.ckpt")
    for name in ("policy", *whole.frozen_players):
        assert equal(weights(whole, name), weights(resumed, name)), name
    assert (whole.phase, whole.inner_step, whole.batches_seen) == (
        resumed.phase,
        resumed.inner_step,
        resumed.batches_seen,
    )


@pytest.mark.slow
def test_learns_what_the_judge_prefers(tmp_path: Path) -> None:
    for options in (
        {},
        {"loss_type": "ipo"},
        {"loss_type": "reinforce_to_go"},
        {"lora": {**LORA, "r": 8}},
        {"loading": Loading(micro_batch_size=7)},
    ):
        module = build(beta=0.02, samples_per_prompt=8, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), **options)

        def share(module: NashMP) -> float:
            words = [word for text in module.respond(list(PROMPTS) * 8, seed=9)[0] for word in text.split()]
            return sum(int(word[1:]) < 6 for word in words) / len(words)

        before = share(module)
        trainer(tmp_path, 30).fit(module, prompts())
        assert share(module) > before + 0.2, options


def as_drawn(module: NashMP, tokens: Tensor) -> Drawn:
    mask = response_mask(tokens, [1])
    return Drawn(tokens, mask, module.decode(tokens, mask), (tokens == 1).any(1))


def test_missing_end_loses() -> None:
    module = build()
    drawn = as_drawn(module, torch.tensor([[5, 1, 0], [5, 5, 5], [6, 6, 6]]))
    pref, pairs = ask_preferences(module.judge, ["w0"], drawn, None, missing_eos_loses=True)
    assert pairs == 3
    assert pref[0].tolist() == [[0.5, 1.0, 1.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]


def test_preferences_are_antisymmetric_and_ordered_by_prompt() -> None:
    module = build()
    mine = as_drawn(module, torch.randint(2, 20, (6, 4)))
    pref, _ = ask_preferences(module.judge, ["w0", "w1"], mine, None)
    torch.testing.assert_close(pref + pref.mT, torch.ones(2, 3, 3))
    assert pref[1, 0, 2].item() == pytest.approx(more_low_words("", mine.texts[3], mine.texts[5]))
    others = as_drawn(module, torch.randint(2, 20, (6, 4)))
    against, pairs = ask_preferences(module.judge, ["w0", "w1"], mine, others)
    assert pairs == 18
    assert against[1, 2, 0].item() == pytest.approx(more_low_words("", mine.texts[5], others.texts[3]))


def test_metrics_are_logged_with_masks(tmp_path: Path) -> None:
    module = build(mode=Prox(opponent="policy"))
    fit = trainer(tmp_path, 1, log_every_n_steps=1, val_check_interval=1)
    fit.fit(module, prompts())
    names = {
        "loss", "kl/ref", "kl/ref_k3", "kl/target", "entropy", "preference/spread", "win_rate/opponent", "length/mean",
        "eos_rate", "judge/pairs", "time/generate", "time/judge", "time/score", "tokens_per_s/generated",
        "tokens_per_s/trained", "grad_norm", "time/train",
    }  # fmt: skip
    assert names <= {name.removeprefix("train/") for name in fit.callback_metrics}
    assert fit.callback_metrics["train/kl/ref"] == 0
    assert 0 < fit.callback_metrics["train/entropy"] <= math.log(20)
    assert {"val/kl/ref", "val/entropy", "val/length/mean", "val/eos_rate"} <= set(fit.callback_metrics)


def test_metrics_are_made_at_logging_steps_only(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(set(trainer.logged_metrics))

    fit = trainer(tmp_path, 2, log_every_n_steps=2, callbacks=[Watch()])
    fit.fit(build(), prompts())
    assert seen[0] == {"train/loss"}
    assert {"train/loss", "train/entropy", "train/grad_norm"} <= seen[1]


def test_the_judge_answers_while_the_frozen_players_score() -> None:
    module = build()
    scoring = threading.Event()
    score = module.score

    def watched(name: str, *arguments: Any) -> Any:
        scoring.set()
        return score(name, *arguments)

    def judge(prompts: Any, a: Any, b: Any) -> list[float]:
        assert scoring.wait(timeout=60), "nobody scored before the judge had answered"
        return [0.5] * len(a)

    module.score, module.judge = watched, judge  # type: ignore[method-assign,assignment]
    module.training_step(BATCH, 0)
    module.judge = lambda *_: [2.0]
    with pytest.raises(ValueError, match="shape"):  # its errors arrive
        module.training_step(BATCH, 0)


@pytest.mark.parametrize("lora", [None, LORA])
def test_reference_from_another_folder(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    path = save_tiny(tmp_path / "other")
    module = build(lora=lora, reference=Reference(path, offload=True))
    other = build(model=path, tokenizer=None)
    encoded = module.encode(list(PROMPTS))
    tokens = drawn_tokens()

    def scores(module: NashMP, name: str) -> Tensor:
        with torch.no_grad():
            return module.score(name, encoded, tokens)[0]

    assert torch.equal(scores(module, "reference"), scores(other, "policy"))
    assert not torch.allclose(scores(module, "policy"), scores(other, "policy"), atol=0.1)
    assert torch.equal(scores(module, "policy"), scores(module, "target"))
    module.restart_from_policy()  # a warm-up makes no other reference
    assert torch.equal(scores(module, "reference"), scores(other, "policy"))
    trainer(tmp_path, 2).fit(module, prompts())
    assert torch.equal(scores(module, "reference"), scores(other, "policy"))


def test_reference_in_another_type_waits_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(reference=Reference(dtype="bfloat16", offload=True))
    reference = module.frozen["reference"]
    assert {parameter.dtype for parameter in reference.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in module.player_parameters("target")} == {torch.float32}
    moves: list[Any] = []
    monkeypatch.setattr(reference, "to", lambda device: moves.append(device) or reference)
    module.training_step(BATCH, 0)
    assert moves == [module.device, "cpu"]


@pytest.mark.slow
def test_compiled_blocks_take_the_same_steps(tmp_path: Path) -> None:
    plain, compiled = build(), build(loading=Loading(torch_compile=True))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    for module in (plain, compiled):
        trainer(tmp_path, 3).fit(module, prompts())
    for one, two in zip(weights(plain, "policy"), weights(compiled, "policy"), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_base_weights_stay_out_of_checkpoints_only_if_they_can_be_loaded_again(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base")

    def checkpoint(module: NashMP) -> dict[str, Any]:
        fit = trainer(tmp_path, 1)
        fit.fit(module, prompts())
        fit.save_checkpoint(tmp_path / "x.ckpt")
        return torch.load(tmp_path / "x.ckpt", weights_only=True)

    adapters = build(model=path, tokenizer=None, lora=LORA)
    saved = checkpoint(adapters)
    assert all("lora_" in name for name in saved["state_dict"])
    assert len(saved["base_weights_hash"]) == 64
    loaded = NashMP.load_from_checkpoint(tmp_path / "x.ckpt", judge=adapters.judge)
    for name, value in adapters.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    whole = checkpoint(build(model=path, tokenizer=None))
    assert not any(name.startswith("frozen.reference") for name in whole["state_dict"])
    assert any(name.startswith("policy") for name in whole["state_dict"])
    assert NashMP.load_from_checkpoint(tmp_path / "x.ckpt", judge=adapters.judge).policy is not None
    assert checkpoint(build(lora=LORA))["base_weights_hash"] is None  # from a configuration: all of it
    changed = build(model=path, tokenizer=None, lora=LORA)
    changed.restart_from_policy()
    assert checkpoint(changed)["base_weights_hash"] is None

    checkpoint(adapters)
    torch.manual_seed(99)
    other = torch.load(tmp_path / "x.ckpt", weights_only=True)
    from lit_methods.llm.loading import load_causal_lm

    load_causal_lm(LLAMA).save_pretrained(path)
    with pytest.raises(ValueError, match="not the ones it was trained on"):
        NashMP.load_from_checkpoint(tmp_path / "x.ckpt", judge=adapters.judge)
    assert other["nash_mp"]["inner_step"] == 2


def test_full_precision_of_what_is_trained(tmp_path: Path) -> None:
    module = build(lora=LORA, loading=Loading(dtype="bfloat16"))
    assert module.policy is not None
    assert module.policy.base.dtype == torch.bfloat16
    assert {parameter.dtype for name in ("policy", "target") for parameter in module.player_parameters(name)} == {
        torch.float32
    }
    trainer(tmp_path, 2).fit(module, prompts())
    mixed = build()
    trainer(tmp_path, 2, precision="bf16-mixed").fit(mixed, prompts())
    assert all(torch.isfinite(parameter).all() for parameter in mixed.parameters())
    with pytest.raises(ValueError, match="bf16-mixed"):
        trainer(tmp_path, 1, precision="bf16-true").fit(build(), prompts())


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, saving = build(), build(loading=Loading(gradient_checkpointing=True))
    for module in (plain, saving):
        trainer(tmp_path, 2).fit(module, prompts())
    assert saving.policy is not None
    assert saving.policy.base.is_gradient_checkpointing
    for one, two in zip(weights(plain, "policy"), weights(saving, "policy"), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be"),
        ({"eta": 0.0}, "eta must be"),
        ({"samples_per_prompt": 1}, "samples_per_prompt must be >= 2, got 1"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"loss_type": "dpo"}, "loss_type must be one of"),
        ({"mode": "self-play"}, "mode must be 'prox', 'mirror_prox'"),
        ({"mode": "mirror_prox", "eta": math.inf}, "eta must be finite with mirror_prox"),
        ({"loading": Loading(dtype="bfloat16")}, "bf16-mixed"),
        ({"loading": Loading(load_in_4bit=True)}, "load_in_4bit needs lora"),
        ({"lora": {"lora_dropout": 0.1}}, "lora_dropout must be 0"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "adapters only"),
        ({"lora": LORA, "reference": Reference(offload=True)}, "set the reference's model"),
        ({"lora": LORA, "reference": Reference(dtype="bfloat16")}, "set the reference's model"),
        ({"tokenizer": None}, "tokenizer must be given"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Generation(max_new_tokens=0), "max_new_tokens must be >= 1, got 0"),
        (lambda: Generation(max_prompt_length=0), "max_prompt_length must be >= 1, got 0"),
        (lambda: Generation(seed=-1), "seed must be >= 0, got -1"),
        (lambda: Loading(micro_batch_size=0), "micro_batch_size must be >= 1, got 0"),
        (lambda: Loading(logprob_chunk_size=0), "logprob_chunk_size must be >= 1, got 0"),
        (lambda: Loading(dtype="float8"), "dtype must name a type of torch, .* got 'float8'"),
        (lambda: Prox(kappa=0.0), r"kappa must be in \(0, 1\], got 0.0"),
        (lambda: Prox(kappa=1.5), r"kappa must be in \(0, 1\], got 1.5"),
        (lambda: Prox(copy_every=0), "copy_every must be >= 1, got 0"),
        (lambda: Prox(mixture=1.0), r"mixture must be in \(0, 1\), got 1.0"),
        (lambda: Prox(opponent="me"), "opponent must be one of"),  # type: ignore[arg-type]
        (lambda: MirrorProx(0), "inner_steps must be >= 1, got 0"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_former_arguments_warn_and_mean_the_same(tmp_path: Path) -> None:
    former: dict[str, Any] = {
        "mode": "mirror_prox", "inner_steps": 3, "max_new_tokens": 5, "seed": 7, "dtype": "bfloat16",
        "micro_batch_size": 2, "lora": LORA, "kl_credit": "to_go",
    }  # fmt: skip
    with pytest.warns(FutureWarning) as caught:
        module = NashMP(LLAMA, FunctionJudge(more_low_words), {"words": WORDS}, **former)
    said = " ".join(str(warning.message) for warning in caught)
    assert "max_new_tokens has moved: write generation=Generation(max_new_tokens=5)" in said
    assert "inner_steps has moved: write mode=MirrorProx(inner_steps=3)" in said
    assert "dtype has moved: write loading=Loading(dtype='bfloat16')" in said
    assert 'loss_type="reinforce_to_go"' in said
    assert module.mode == MirrorProx(3)
    assert (module.generation.max_new_tokens, module.generation.seed) == (5, 7)
    assert module.loading == Loading(dtype="bfloat16", micro_batch_size=2)
    assert module.loss_type == "reinforce_to_go"
    with pytest.warns(FutureWarning, match=r"write mode=Prox\(copy_every=2\)"):
        assert build(generation=None, inner_steps=2).mode == Prox(copy_every=2)
    with pytest.raises(TypeError, match="no argument 'max_tokens'; did you mean 'max_new_tokens'"):
        build(max_tokens=2)


def test_settings_are_kept_in_checkpoints_as_plain_data(tmp_path: Path) -> None:
    module = build(mode=MirrorProx(3), generation=Generation(5), loading=Loading(micro_batch_size=2))
    fit = trainer(tmp_path, 1)
    fit.fit(module, prompts())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    kept = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert kept["mode"] == {"inner_steps": 3}
    assert kept["generation"]["max_new_tokens"] == 5
    loaded = NashMP.load_from_checkpoint(tmp_path / "x.ckpt", judge=module.judge)
    assert (loaded.mode, loaded.loading) == (module.mode, module.loading)


def test_truncated_sampling_warns() -> None:
    with pytest.warns(UserWarning, match="biased"):
        build(generation=Generation(top_k=5))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_equal_players_have_log_ratios_of_exactly_zero(
    tmp_path: Path, checkpointing: bool, micro_batch_size: int | None, lora: dict[str, Any] | None, precision: Any
) -> None:
    loading = Loading(gradient_checkpointing=checkpointing, micro_batch_size=micro_batch_size)
    module = build(lora=lora, loading=loading, samples_per_prompt=3, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    fit = trainer(tmp_path, 1, precision=precision, log_every_n_steps=1)
    fit.fit(module, prompts())
    for name in ("kl/ref", "kl/target", "kl/ref_k3"):
        assert fit.callback_metrics[f"train/{name}"] == 0, name
    assert any(parameter.grad is not None for parameter in module.player_parameters("policy"))


@pytest.mark.slow
def test_compiled_players_have_log_ratios_of_exactly_zero(tmp_path: Path) -> None:
    module = build(loading=Loading(torch_compile=True))
    fit = trainer(tmp_path, 1, precision="bf16-mixed", log_every_n_steps=1)
    fit.fit(module, prompts())
    assert fit.callback_metrics["train/kl/ref"] == fit.callback_metrics["train/kl/target"] == 0


def test_players_and_stages_draw_from_streams_of_their_own() -> None:
    module = build(mode="mirror_prox", generation=Generation(max_new_tokens=12))
    many = PROMPTS * 4
    answers = [module.respond(many, player, seed=5)[0] for player in ("policy", "reference", "target", "opponent")]
    answers.append(module.respond(many, "policy", seed=6)[0])
    answers.append(module.validation_step(PromptBatch(many, [], torch.arange(len(many))), 5)["responses"])
    asked: list[list[str]] = []
    module.judge = lambda prompts, a, b: asked.append(list(a)) or [0.5] * len(a)  # type: ignore[func-returns-value]
    module.batches_seen = 5
    module.training_step(PromptBatch(many, [], torch.arange(len(many))), 0)
    training = asked[0]
    for index, one in enumerate([*answers, training]):
        for other in [*answers, training][:index]:
            assert one != other  # equal weights, other draws
    assert module.respond(many, "target", seed=5)[0] == answers[2]
    assert build(mode="mirror_prox", generation=Generation(12, seed=1)).respond(many, seed=5)[0] != answers[0]


def test_times_are_those_of_their_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the sampler and the judge move."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    local = LocalSampler()

    def sampler(*arguments: Any) -> Tensor:
        now[0] += 5.0
        return local(*arguments)

    def judge(prompts: Any, a: Any, b: Any) -> list[float]:
        now[0] += 7.0
        return [0.5] * len(a)

    module = build(sampler=sampler)
    module.judge = judge
    logged: dict[str, Any] = {}
    monkeypatch.setattr(module, "_log", lambda stage, metrics, size: logged.update(metrics))
    module.training_step(BATCH, 0)
    assert (logged["time/generate"], logged["time/judge"], logged["time/score"]) == (5.0, 7.0, 7.0)
    tokens = logged["length/mean"] * len(PROMPTS) * module.samples_per_prompt
    torch.testing.assert_close(logged["tokens_per_s/generated"], tokens / 5.0)
    torch.testing.assert_close(logged["tokens_per_s/trained"], tokens / 7.0)


@pytest.mark.parametrize("kind", [EMAWeightAveraging, WeightAveraging])
@pytest.mark.parametrize(("lora", "dtype"), [(None, "float32"), (LORA, "float32"), (LORA, "bfloat16")])
def test_weight_averaging_averages_the_policy_alone_and_resumes(
    tmp_path: Path, kind: Any, lora: dict[str, Any] | None, dtype: str
) -> None:
    path = save_tiny(tmp_path / "base")

    def run(steps: int, checkpoint: Path | None = None) -> tuple[NashMP, Any]:
        module = build(model=path, tokenizer=None, lora=lora, loading=Loading(dtype=dtype))
        average = kind(decay=0.9) if kind is EMAWeightAveraging else kind()
        keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        fit = trainer(tmp_path, steps, callbacks=[average, keep], enable_checkpointing=True, val_check_interval=2)
        base = {name: p.detach().clone() for name, p in module.named_parameters() if lora and "lora_" not in name}
        fit.fit(module, prompts(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        for name, value in base.items():
            assert torch.equal(module.get_parameter(name), value), name
        return module, torch.load(tmp_path / "step=6.ckpt", weights_only=True)

    whole, saved = run(7)
    resumed, saved_again = run(7, tmp_path / "step=3.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert saved[key].keys() == saved_again[key].keys()
        assert all(torch.equal(value, saved_again[key][name]) for name, value in saved[key].items()), key
        assert all("lora_" in name for name in saved[key]) == (lora is not None)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    loaded = NashMP.load_from_checkpoint(tmp_path / "step=6.ckpt", judge=whole.judge)
    for name, value in saved["state_dict"].items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_stochastic_weight_averaging_is_refused(tmp_path: Path) -> None:
    fit = trainer(tmp_path, -1, max_epochs=4, callbacks=[StochasticWeightAveraging(1e-2)])
    with pytest.raises(ValueError, match="averages nothing; use WeightAveraging"):
        fit.fit(build(), prompts())


INTERRUPTED = """
import os, signal, threading, lightning as L
from lit_methods.datamodules import PromptDataModule
from lit_methods.llm import NashMP
from tests.unit.llm.tiny import LLAMA, PROMPTS, WORDS

def judge(prompts, a, b):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    threading.Event().wait()  # for ever

trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
trainer.fit(NashMP(LLAMA, judge, {"words": WORDS}), PromptDataModule(PROMPTS, val_size=0, batch_size=2))
"""


def test_a_judge_that_hangs_can_be_interrupted() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], timeout=120, capture_output=True, text=True, cwd=Path(__file__).parents[4]
    )
    assert "KeyboardInterrupt" in done.stderr


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A saved LoRA adapter that changes its base a lot."""
    module = build(model=save_tiny(tmp_path / "base"), tokenizer=None, lora=LORA)
    with torch.no_grad():
        for parameter in module.player_parameters("policy"):
            parameter.normal_()
    ExportHF().export(module, tmp_path / "adapter")
    (tmp_path / "expected.pt").unlink(missing_ok=True)
    torch.save(greedy(module, "policy"), tmp_path / "expected.pt")
    return tmp_path / "adapter"


def greedy(module: NashMP, player: str) -> Tensor:
    tokens = torch.arange(2, 10).repeat(len(PROMPTS), 1)
    full = Drawn(tokens, torch.ones_like(tokens, dtype=torch.bool), [], torch.zeros(len(PROMPTS), dtype=torch.bool))
    with torch.no_grad():
        return module.score(player, module.encode(list(PROMPTS)), full)[0]


@pytest.mark.parametrize("lora", [None, LORA])
def test_an_adapter_folder_is_the_policy_and_its_reference(
    adapter: Path, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    expected = torch.load(tmp_path / "expected.pt")
    base = greedy(build(model=str(tmp_path / "base"), tokenizer=None), "policy")
    assert (expected - base).abs().max() > 0.5
    module = build(model=str(adapter), tokenizer=None, lora=lora)
    for player in ("policy", "reference", "target"):
        torch.testing.assert_close(greedy(module, player), expected, atol=1e-4, rtol=0)
    referring = build(model=str(tmp_path / "base"), tokenizer=None, lora=lora, reference=str(adapter))
    torch.testing.assert_close(greedy(referring, "reference"), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(greedy(referring, "policy"), base, atol=1e-4, rtol=0)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, 1, callbacks=[keep], enable_checkpointing=True).fit(module, prompts())
    loaded = NashMP.load_from_checkpoint(tmp_path / "step=1.ckpt", judge=module.judge)
    assert torch.equal(greedy(loaded, "policy"), greedy(module, "policy"))
    if lora is not None:
        with pytest.raises(ValueError, match="merging another adapter"):
            ExportHF().export(module, tmp_path / "out")
        ExportHF(merge=True).export(module, tmp_path / "out")
        merged = build(model=str(tmp_path / "out"), tokenizer=None)
        torch.testing.assert_close(greedy(merged, "policy"), greedy(module, "policy"), atol=1e-4, rtol=0)


def test_adapters_that_cannot_be_loaded_are_named(adapter: Path) -> None:
    with pytest.raises(ValueError, match="load_in_4bit cannot merge the adapter"):
        build(model=str(adapter), tokenizer=None, lora=LORA, loading=Loading(load_in_4bit=True))
    (adapter / "tokenizer.json").unlink()
    (adapter / "tokenizer_config.json").unlink()
    assert build(model=str(adapter), tokenizer=None).tokenizer.eos_token == "<eos>"  # that of the base
    shutil.rmtree(adapter.parent / "base")
    with pytest.raises(OSError, match=r"is an adapter of .*base', which cannot be loaded"):
        build(model=str(adapter), tokenizer={"words": WORDS})
