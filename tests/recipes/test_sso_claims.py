"""The claims of recipes/sso, with seeds; by hand with ``-m slow``."""

import logging
from collections.abc import Callable, Iterable
from itertools import pairwise
from statistics import mean
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional

from lit_methods.datamodules import DigitsDataModule, ImitationDataModule
from lit_methods.nets import MLP, LinearFeedback
from lit_methods.online import OnlineImitation
from lit_methods.optim import SSO
from lit_methods.optim.sso import GaussNewton
from tests.benchmarks.bench_sso import logistic, matrix_factorization, train

SEEDS = (0, 1, 2)
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
GAIN = [[-0.7224, -6.83, -0.9233, -1.0845]]


def quiet(**options: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(**off, accelerator="cpu", use_distributed_sampler=False, num_sanity_val_steps=0, **options)


@pytest.mark.slow
def test_more_inner_steps_give_lower_losses_and_beat_tuned_optimizers() -> None:
    """Ill-conditioned logistic regression, 200 gradients, eta = 1/L."""
    grid = [(torch.optim.SGD, lr) for lr in (1.0, 3.0, 10.0, 30.0)]
    grid += [(torch.optim.Adam, lr) for lr in (0.1, 0.3, 1.0, 3.0)]
    grid += [(torch.optim.Adagrad, lr) for lr in (0.3, 1.0, 3.0, 10.0)]
    for seed in SEEDS:
        ours = [
            train(logistic(seed), lambda p, m=m: SSO(p, lr=None, loss="bce", inner=GaussNewton(steps=m)), 200)["loss"]
            for m in (1, 5, 20, 100)
        ]
        theirs = min(train(logistic(seed), lambda p, k=kind, lr=lr: k(p, lr=lr), 200)["loss"] for kind, lr in grid)
        assert all(more < less for less, more in pairwise(ours)), (seed, ours)
        assert ours[2] <= 0.9 * theirs, (seed, ours, theirs)


@pytest.mark.slow
def test_adam_is_better_where_the_short_directions_hardly_matter() -> None:
    """The same with plain labels 1[Xw > 0]: the README says so."""

    def loss(seed: int, make: Make) -> float:
        return train(logistic(seed, plain=True), make, 200)["loss"]

    for seed in SEEDS:
        ours = [loss(seed, lambda p, m=m: SSO(p, lr=None, loss="bce", inner=GaussNewton(steps=m))) for m in (1, 20)]
        adam = loss(seed, lambda p: torch.optim.Adam(p, lr=1.0))
        assert adam < ours[1] < ours[0], (seed, ours, adam)


@pytest.mark.slow
def test_matrix_factorization_reaches_tiny_losses() -> None:
    """50 full-batch gradients from a loss of about 8."""
    for seed in SEEDS:
        ours = {
            m: train(matrix_factorization(seed), lambda p, m=m: SSO(p, lr=0.5, inner=GaussNewton(steps=m)), 50)["loss"]
            for m in (1, 10, 100)
        }
        adam = train(matrix_factorization(seed), lambda p: torch.optim.Adam(p, lr=3e-2), 50)["loss"]
        assert ours[1] < 1e-2, ours
        assert ours[10] < 1e-5, ours
        assert ours[100] < 1e-10, ours
        assert adam > 1e-3


class Digits(LightningModule):
    """Somebody's module with an ordinary training_step."""

    def __init__(self, make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.make = MLP(64, [32], 10, activation="Tanh"), make

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.net)


def digits_loss(seed: int, make: Callable[[nn.Module], torch.optim.Optimizer], **options: Any) -> float:
    torch.manual_seed(seed)
    module, data = Digits(make), DigitsDataModule(batch_size=128, seed=seed, val_size=0, test_size=0)
    quiet(max_epochs=3, limit_val_batches=0, **options).fit(module, data)
    with torch.no_grad():
        return float(functional.cross_entropy(module.net(data.train_data.x), data.train_data.y))


@pytest.mark.slow
def test_capture_mode_in_a_plain_trainer_beats_adam_and_sgd_on_digits() -> None:
    """3 epochs of 15 batches; mean over seeds of the full loss."""
    ways: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], dict[str, str]]] = {
        "SGD": (lambda net: torch.optim.SGD(net.parameters(), lr=0.5), {}),
        "Adam": (lambda net: torch.optim.Adam(net.parameters(), lr=1e-2), {}),
        "SSO m=1": (lambda net: SSO(net.parameters(), lr=2.0, target_module=net, inner=GaussNewton(steps=1)), {}),
        "SSO m=10": (lambda net: SSO(net.parameters(), lr=2.0, target_module=net), {}),
        "SSO eta=10": (lambda net: SSO(net.parameters(), lr=10.0, target_module=net), {}),
        "bf16": (lambda net: SSO(net.parameters(), lr=10.0, target_module=net), {"precision": "bf16-mixed"}),
    }
    losses = {name: mean(digits_loss(s, make, **options) for s in SEEDS) for name, (make, options) in ways.items()}
    assert losses["SSO m=10"] < losses["Adam"] < losses["SGD"], losses
    assert losses["SSO m=10"] < 0.6 * losses["SSO m=1"], losses
    assert losses["SSO eta=10"] < losses["SSO m=10"], losses
    assert abs(losses["bf16"] - losses["SSO eta=10"]) < 0.02, losses


def imitate(seed: int, make: Make) -> tuple[float, float, float]:
    """Cumulative loss, return after the last round, loss of the last round."""
    torch.manual_seed(seed)
    data = ImitationDataModule("InvertedPendulum-v5", LinearFeedback(GAIN), seed=seed)
    module = OnlineImitation(MLP(4, [], 1), zero_init=True, optimizer=make)
    trainer = quiet(max_epochs=20, reload_dataloaders_every_n_epochs=1, check_val_every_n_epoch=20)
    trainer.fit(module, data)
    metrics = trainer.callback_metrics
    return float(module.cumulative_loss), float(metrics["val/return"]), float(metrics["train/loss"])


@pytest.mark.slow
def test_imitation_needs_fewer_rounds_than_tuned_optimizers() -> None:
    """20 rounds of 100 steps, beta = 0, a linear policy from zero."""
    pytest.importorskip("gymnasium")
    grid: list[Make] = [lambda p, lr=lr: torch.optim.SGD(p, lr=lr) for lr in (0.1, 0.3)]  # type: ignore[misc]
    grid += [lambda p, lr=lr: torch.optim.Adam(p, lr=lr) for lr in (0.1, 0.3, 1.0)]  # type: ignore[misc]
    grid += [lambda p, lr=lr: torch.optim.Adagrad(p, lr=lr) for lr in (0.3, 1.0, 3.0)]  # type: ignore[misc]
    for seed in SEEDS:
        ours = {
            m: imitate(seed, lambda p, m=m: SSO(p, lr=None, loss="mse", inner=GaussNewton(steps=m, tol=1e-12)))
            for m in (1, 10, 100)
        }
        theirs = min(imitate(seed, make)[0] for make in grid)
        assert ours[10][0] < 0.5 * theirs, (ours, theirs)
        assert ours[100][0] < 0.5 * theirs, (ours, theirs)
        assert ours[100][0] < ours[1][0]
        assert ours[10][1] == ours[100][1] == 1000
        assert ours[100][2] < ours[10][2] < ours[1][2]
