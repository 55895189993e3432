from pathlib import Path

import lightning as L
import pytest
import torch

from lit_methods.games import PreferenceGame, regularized_nash

RPS = [[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]


def trainer(path: Path, epochs: int) -> L.Trainer:
    return L.Trainer(
        default_root_dir=path,
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def test_linear_convergence_while_self_play_cycles(tmp_path: Path) -> None:
    game = PreferenceGame(RPS, [0.7, 0.2, 0.1], beta=0.01, num_iterations=100)
    run = trainer(tmp_path, 1)
    run.fit(game)
    metrics = run.callback_metrics
    assert metrics["train/kl/nash_mp"] < 2e-10 < metrics["train/kl/bound"]
    assert metrics["train/kl/nash_prox"] < metrics["train/kl/bound"]
    assert metrics["train/kl/self_play"] > 0.5
    assert metrics["train/kl/nash_md"] > 0.1
    assert metrics["train/exploitability/nash_mp"] < 1e-6 < metrics["train/exploitability/self_play"]
    expected = regularized_nash(game.pref, game.log_ref, 0.01).exp()
    torch.testing.assert_close(game.predict_step(torch.zeros(1), 0)[0], expected, atol=1e-4, rtol=0)


def test_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    straight = PreferenceGame(RPS, [0.7, 0.2, 0.1], num_iterations=10)
    trainer(tmp_path, 2).fit(straight)
    half = PreferenceGame(RPS, [0.7, 0.2, 0.1], num_iterations=10)
    run = trainer(tmp_path, 1)
    run.fit(half)
    run.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed = PreferenceGame.load_from_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, 1).fit(resumed)
    assert torch.equal(straight.log_pi, resumed.log_pi)
    assert resumed.num_queries == 40


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="eta=-1"):
        PreferenceGame(RPS, eta=-1.0)
    with pytest.raises(ValueError, match="nash_md_eta=0"):
        PreferenceGame(RPS, nash_md_eta=0.0)
    with pytest.raises(ValueError, match="beta must be > 0"):
        PreferenceGame(RPS, beta=0.0)
