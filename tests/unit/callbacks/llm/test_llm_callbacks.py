"""Callbacks of language-model methods on a tiny NashMP."""

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

from lit_methods.callbacks import ExportHF, SampleTable, SFTWarmup, WinRate
from lit_methods.callbacks.llm.win_rate import bootstrap_interval, length_controlled
from lit_methods.datamodules import PromptDataModule
from lit_methods.llm import FunctionJudge, Generation, Loading, NashMP, SupervisedFineTuning
from lit_methods.llm.language_model import load_tokenizer
from lit_methods.llm.loading import load_causal_lm
from tests.unit.llm.tiny import LLAMA, LORA, PROMPTS, WORDS, more_low_words, save_tiny

ROWS = [{"prompt": prompt, "response": "w3 w4 w5"} for prompt in PROMPTS] * 3


def build(**options: Any) -> NashMP:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "model": LLAMA,
        "tokenizer": {"words": WORDS},
        "generation": Generation(max_new_tokens=6),
    }
    return NashMP(judge=FunctionJudge(more_low_words), **{**defaults, **options})


def fit(folder: Path, module: NashMP, callbacks: list[L.Callback], steps: int = 2, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    trainer.fit(module, PromptDataModule(ROWS, val_size=8, batch_size=4), **options)
    return trainer


@pytest.mark.parametrize("lora", [None, LORA])
def test_warm_up_teaches_the_responses_and_becomes_the_reference(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    module = build(lora=lora)
    warmup = SFTWarmup(steps=60, lr=1e-2)
    seen: dict[str, Any] = {}

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen["grads"] = [name for name, p in module.named_parameters() if p.grad is not None]
            seen["trained"] = [p.requires_grad for p in module.player_parameters("policy")]
            seen["policy"] = module.respond(PROMPTS)[0]
            seen["reference"] = module.supervised_loss(PROMPTS, ["w3 w4 w5"] * len(PROMPTS))
            with torch.no_grad(), module.player("reference") as reference:
                rows = module.encode(PROMPTS)
                tokens = torch.tensor([[5, 6, 7, 1]] * len(PROMPTS))
                mask = torch.ones_like(tokens, dtype=torch.bool)
                seen["gap"] = reference.score(rows, tokens, mask)[0].sum(1)

    fit(tmp_path, module, [warmup, Watch()], steps=1)
    assert warmup.losses[-1] < 0.3 < warmup.losses[0]
    assert seen["policy"].count("w3 w4 w5") >= 6
    assert not seen["grads"]
    assert all(seen["trained"])
    torch.testing.assert_close(seen["gap"].mean() / 4, -seen["reference"].detach(), atol=1e-5, rtol=0)
    frozen = [p for name, p in module.named_parameters() if name.startswith("frozen") or (lora and "lora_" not in name)]
    assert not any(p.requires_grad for p in frozen)


def test_warm_up_is_skipped_on_resume(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = SFTWarmup(steps=3)
    fit(tmp_path, build(), [first, keep], steps=1)
    assert len(first.losses) == 3
    second = SFTWarmup(steps=3)
    module = build()
    fit(tmp_path, module, [second], steps=2, ckpt_path=tmp_path / "step=1.ckpt")
    assert second.losses == []
    assert module.base_changed


def test_warm_up_needs_responses(tmp_path: Path) -> None:
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[SFTWarmup()]
    )
    with pytest.raises(ValueError, match="response_column"):
        trainer.fit(build(), PromptDataModule(list(PROMPTS), val_size=0, batch_size=2))


def test_win_rates_against_everybody(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = build(optimizer=lambda params: torch.optim.Adam(params, lr=0.05))
    fit(tmp_path, module, [keep], steps=1)
    path = save_tiny(tmp_path / "folder")
    callback = WinRate(
        ["reference", "target", str(tmp_path / "step=1.ckpt"), path],
        texts={"best": "w0 w1 w2", "worst_words": "w9 w9"},
        num_bootstrap=50,
    )
    module.configure_model()
    policy = module.policy
    metrics = fit(tmp_path, module, [callback], steps=1).callback_metrics
    for name in ("reference", "target", "step=1", "folder", "best", "worst_words"):
        assert metrics[f"val/win_rate_low/{name}"] <= metrics[f"val/win_rate/{name}"]
        assert metrics[f"val/win_rate/{name}"] <= metrics[f"val/win_rate_high/{name}"]
    assert metrics["val/win_rate/worst"] == metrics["val/win_rate/best"] < 0.5
    assert metrics["val/win_rate/worst_words"] > 0.5
    assert 0 < metrics["val/win_rate_lc/reference"] < 1
    # the policy is back in its place, and plays itself from its checkpoint with other draws
    assert module.policy is policy
    assert len(callback.records["reference"]) == 8


def test_policy_against_itself_is_a_tie() -> None:
    module = build()
    module.configure_model()
    data = PromptDataModule(list(PROMPTS) * 16, val_size=0, batch_size=128)
    data.setup("fit")
    callback = WinRate(["reference"])
    outputs = module.validation_step(next(iter(data.train_dataloader())), 0)
    callback.on_validation_batch_end(L.Trainer(logger=False), module, outputs, None, 0)
    wins = torch.tensor([record[1] for record in callback.records["reference"]], dtype=torch.float64)
    low, high = bootstrap_interval(wins, 0.999, 500)
    assert low < 0.5 < high
    assert wins.std() > 0.1  # other draws than its own


def test_bootstrap_covers_the_mean() -> None:
    covered = 0
    for seed in range(200):
        values = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        low, high = bootstrap_interval(values, 0.9, 300)
        covered += low <= 0.5 <= high
    assert 165 <= covered <= 195


def test_length_control_removes_the_advantage_of_length() -> None:
    excess = torch.linspace(-5, 15, 201, dtype=torch.float64)
    feature = torch.tanh(excess / excess.std())
    wins = torch.sigmoid(0.4 + 2.0 * feature)
    assert wins.mean() > 0.7
    assert length_controlled(wins, excess) == pytest.approx(torch.sigmoid(torch.tensor(0.4)).item(), abs=0.03)
    assert length_controlled(torch.full((10,), 0.7, dtype=torch.float64), torch.zeros(10).double()) == pytest.approx(
        0.7, abs=1e-4
    )


def test_sample_table(tmp_path: Path) -> None:
    fit(tmp_path, build(), [SampleTable(num_prompts=3, max_characters=4)], steps=2)
    lines = (tmp_path / "samples.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("##")] == ["## step 1", "## step 2"]
    assert len([line for line in lines if line.startswith("|")]) == 2 * 5
    assert max(len(cell.strip()) for line in lines[2:] if "w" in line for cell in line.split("|")) <= 5


@pytest.mark.parametrize(("lora", "merge"), [(None, False), (LORA, False), (LORA, True)])
def test_exported_folder_gives_the_same_logits(tmp_path: Path, lora: dict[str, Any] | None, merge: bool) -> None:
    path = save_tiny(tmp_path / "base")
    module = build(model=path, tokenizer=None, lora=lora, optimizer=lambda params: torch.optim.Adam(params, lr=0.05))
    fit(tmp_path, module, [ExportHF(str(tmp_path / "out"), merge=merge)])
    loaded = load_causal_lm(str(tmp_path / "out")).eval()
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    ids = torch.tensor([tokenizer("w1 w2 w3 w4")["input_ids"]])
    assert module.policy is not None
    with torch.no_grad():
        ours, theirs = module.policy.eval().lm(input_ids=ids).logits, loaded(input_ids=ids).logits
        base = load_causal_lm(path).eval()(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (theirs - base).abs().max() > 1e-2
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_export_refuses_an_adapter_without_a_base(tmp_path: Path) -> None:
    module = build(lora=LORA)
    module.configure_model()
    module.base_changed = True
    with pytest.raises(ValueError, match="merge=True"):
        ExportHF().export(module, tmp_path / "out")


def test_an_adapter_folder_plays_as_an_opponent(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base")
    trained = build(model=path, tokenizer=None, lora=LORA)
    trained.configure_model()
    with torch.no_grad():
        for parameter in trained.player_parameters("policy"):
            parameter.normal_()
    ExportHF().export(trained, tmp_path / "adapter")
    ExportHF(merge=True).export(trained, tmp_path / "merged")
    module = build(model=path, tokenizer=None)
    callback = WinRate([str(tmp_path / "adapter"), str(tmp_path / "merged"), path])
    fit(tmp_path, module, [callback], steps=1)
    records = callback.records
    assert records["adapter"] == records["merged"] != records["base"]


@pytest.mark.parametrize("kind", [EMAWeightAveraging, WeightAveraging])
@pytest.mark.parametrize("lora", [None, LORA])
def test_supervised_fine_tuning_beside_weight_averaging(tmp_path: Path, kind: Any, lora: dict[str, Any] | None) -> None:
    path = save_tiny(tmp_path / "base")

    def run(checkpoint: Path | None = None) -> dict[str, Any]:
        module = SupervisedFineTuning(path, lora=lora, optimizer=lambda params: torch.optim.Adam(params, lr=1e-2))
        keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = L.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", max_steps=4, logger=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, callbacks=[kind(), keep],
        )  # fmt: skip
        trainer.fit(module, PromptDataModule(ROWS, val_size=4, batch_size=4), ckpt_path=checkpoint)
        return torch.load(tmp_path / "step=4.ckpt", weights_only=True)

    whole, resumed = run(), run(tmp_path / "step=2.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert all("lora_" in name for name in whole[key]) == (lora is not None)
        for name, value in whole[key].items():
            assert torch.equal(value, resumed[key][name]), name


def test_supervised_fine_tuning_refuses_averages_of_nothing_and_former_arguments_warn(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match=r"write generation=Generation\(max_new_tokens=6\)"):
        module = SupervisedFineTuning(LLAMA, {"words": WORDS}, max_new_tokens=6)
    assert module.generation.max_new_tokens == 6
    trainer = L.Trainer(max_epochs=4, accelerator="cpu", logger=False, callbacks=[StochasticWeightAveraging(1e-2)])
    with pytest.raises(ValueError, match="averages nothing"):
        trainer.fit(module, PromptDataModule(ROWS, val_size=4, batch_size=4))


def test_supervised_fine_tuning(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base")
    for options in ({"model": LLAMA, "tokenizer": {"words": WORDS}}, {"model": path, "lora": {**LORA, "r": 8}}):
        module = SupervisedFineTuning(
            optimizer=lambda p: torch.optim.Adam(p, lr=2e-2), generation=Generation(6), **options
        )
        trainer = L.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", max_steps=60, logger=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        data = PromptDataModule(ROWS, val_size=4, batch_size=4)
        trainer.fit(module, data)
        assert trainer.callback_metrics["val/loss"] < 0.3
        predictions = [text for batch in trainer.predict(module, data) for text in batch]  # type: ignore[union-attr]
        assert predictions.count("w3 w4 w5") >= 3
        trainer.save_checkpoint(tmp_path / "sft.ckpt")
        saved = torch.load(tmp_path / "sft.ckpt", weights_only=True)
        assert (saved["base_weights_hash"] is not None) == ("lora" in options)
        again = SupervisedFineTuning.load_from_checkpoint(tmp_path / "sft.ckpt")
        for name, value in module.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(ValueError, match="tokenizer"):
        SupervisedFineTuning(LLAMA)
    with pytest.raises(ValueError, match="micro_batch_size"):
        SupervisedFineTuning(path, loading=Loading(micro_batch_size=0))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="steps must"):
        SFTWarmup(steps=0)
    with pytest.raises(ValueError, match="lr and"):
        SFTWarmup(lr=0.0)
    with pytest.raises(ValueError, match="confidence must"):
        WinRate(confidence=1.0)
    with pytest.raises(ValueError, match="num_bootstrap must"):
        WinRate(num_bootstrap=0)
    with pytest.raises(ValueError, match="at least one"):
        WinRate([])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        WinRate(["nowhere"])
    with pytest.raises(ValueError, match="num_prompts"):
        SampleTable(num_prompts=0)
