"""Simultaneous play by the module and by the optimizer, and the callback that certifies it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_methods.callbacks import SmallGainCertification
from lit_methods.games import GameModule, MarkovGame, MatrixGame, QuadraticGame
from lit_methods.optim import PseudoGradientRK4

START = [[0.15], [-0.15]]


def play(module: LightningModule, rounds: int = 1, *callbacks: Any, **options: Any) -> Trainer:
    trainer = Trainer(
        max_steps=rounds, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=list(callbacks), use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(module)
    return trainer


def euler(lr: float) -> Any:
    return lambda params: torch.optim.SGD(params, lr=lr)


def test_players_move_at_once_by_their_own_gradients(tmp_path: Path) -> None:
    module = GameModule(QuadraticGame.toy(), START, optimizer=euler(5e-4))
    play(module, default_root_dir=tmp_path)
    assert [float(x) for x in module.players] == pytest.approx([0.150675, -0.14992875], abs=1e-15)


def test_distances_in_the_certified_norm_fall(tmp_path: Path) -> None:
    distances: dict[str, list[float]] = {"euclidean": [], "weighted": []}

    class Watch(SmallGainCertification):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            for name, values in distances.items():
                values.append(float(trainer.callback_metrics[f"train/distance/{name}"]))

    module = GameModule(QuadraticGame.toy(), START, [[0.0], [0.0]], optimizer=euler(5e-3))
    play(module, 300, Watch(), default_root_dir=tmp_path)
    weighted = torch.tensor(distances["weighted"])
    assert bool((weighted.diff() < 0).all())
    assert max(distances["euclidean"]) / distances["euclidean"][0] == pytest.approx(3.19, abs=2e-2)


@pytest.mark.parametrize("lr", [0.02, 0.01])
def test_runge_kutta_is_of_order_four(lr: float) -> None:
    matrix = torch.tensor([[1.0, 10.0], [0.05, 1.0]], dtype=torch.float64)
    exact = torch.linalg.matrix_exp(-matrix) @ torch.tensor([0.15, -0.15], dtype=torch.float64)
    errors = []
    for step in (lr, lr / 2):
        x, y = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.15, -0.15))
        optimizer = PseudoGradientRK4([{"params": [x]}, {"params": [y]}], lr=step)
        for _ in range(round(1 / step)):
            optimizer.step(lambda x=x, y=y: [0.5 * x * x + 10 * x * y, 0.5 * y * y + 0.05 * x * y])
        errors.append(float((torch.stack([x, y]).detach() - exact).norm()))
    assert 14 < errors[0] / errors[1] < 18


def test_runge_kutta_refuses_what_it_cannot_do() -> None:
    x, y = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = PseudoGradientRK4([{"params": [x]}, {"params": [y]}])
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="losses must be one for each parameter group, got 1 for 2"):
        optimizer.step(lambda: [(x * y).sum()])
    before = x.detach().clone()
    paused = PseudoGradientRK4([{"params": [x], "lr": 0.0}, {"params": [y]}])
    losses = paused.step(lambda: [(x * y).sum(), (y * y).sum()])
    assert [float(loss) for loss in losses] == [1.0, 1.0]
    assert torch.equal(x, before)
    assert float(y) < 1


def test_natural_gradients_follow_the_certificate(tmp_path: Path) -> None:
    start = [[0.05, -0.05, 0.02, 0.0], [-0.03, 0.03, 0.0, 0.06]]
    module = GameModule(MarkovGame(), start, [[0.0] * 4] * 2, geometry="natural", optimizer=euler(1.0))
    callback = SmallGainCertification(set_lr=True)
    trainer = play(module, 200, callback, default_root_dir=tmp_path)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(0.13499, abs=1e-4)
    divergence = module.game.divergence(module.blocks(), [x.detach() for x in module.players])
    assert float(divergence.sum()) < 1e-12


@pytest.mark.parametrize("rk4", [False, True])
def test_the_callback_sets_the_rate_and_writes_the_certificate(tmp_path: Path, rk4: bool) -> None:
    optimizer = (lambda params: PseudoGradientRK4(params, lr=1.0)) if rk4 else euler(1.0)
    module = GameModule(QuadraticGame.toy(), START, [[0.0], [0.0]], optimizer=optimizer)
    callback = SmallGainCertification(set_lr=True, strict=True)
    trainer = play(module, 2, callback, default_root_dir=tmp_path)
    found = callback.certificate
    assert trainer.optimizers[0].param_groups[1]["lr"] == (found.rk4_step_certified if rk4 else found.euler_step)
    assert module.weights.tolist() == pytest.approx([1.0, 200.0])
    written = json.loads((tmp_path / "small_gain_certificate.json").read_text())
    assert written == found.to_dict()
    again = SmallGainCertification()
    again.load_state_dict(callback.state_dict())
    assert again.certificate.to_dict() == found.to_dict()


def test_what_the_callback_refuses(tmp_path: Path) -> None:
    def unequal(params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{**params[0], "lr": 0.1}, {**params[1], "lr": 0.2}])

    module = GameModule(QuadraticGame.toy(), START, optimizer=unequal)
    with pytest.raises(ValueError, match=r"unequal learning rates, got \[0.1, 0.2\]"):
        play(module, 1, SmallGainCertification(set_lr=True), default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="the game is not certified: margin -1"):
        play(MatrixGame([[1.0]]), 1, SmallGainCertification(strict=True), default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="not certified.*negate payoffs"):
        play(MatrixGame([[1.0]]), 1, SmallGainCertification(), default_root_dir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": [[0.1]]}, "start must have 2"),
        ({"equilibrium": [[0.0], [0.0, 1.0]]}, r"equilibrium must have blocks of \[1, 1\]"),
        ({"geometry": "flat"}, "geometry must be 'euclidean' or 'natural'"),
        ({"geometry": "natural"}, "QuadraticGame, which has no fisher_metric"),
        ({"rounds": 0}, "rounds must be >= 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GameModule(QuadraticGame.toy(), **{"start": START, **arguments})


def test_losses_where_the_players_are() -> None:
    module = GameModule(QuadraticGame.toy(), START)
    assert module().tolist() == pytest.approx([0.5 * 0.0225 - 0.225, 0.5 * 0.0225 - 0.001125])
    assert math.isclose(float(module.losses(*module.players)[0]), float(module()[0]))
