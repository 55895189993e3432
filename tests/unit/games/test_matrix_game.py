import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.games import MatrixGame, RingGAN
from lit_methods.optim import ExtraGradient, OptimisticOMD

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
}


@pytest.mark.parametrize(
    ("optimizer", "norm"),
    [
        (lambda params: ExtraGradient(params, lr=0.1), 2**0.5 * (0.99**2 + 0.01) ** 50),
        (lambda params: torch.optim.SGD(params, lr=0.1), 2**0.5 * 1.01**50),
    ],
)
def test_free_players(optimizer, norm):
    game = MatrixGame([[1.0]], rounds=100, optimizer=optimizer)
    Trainer(**QUIET).fit(game)
    assert float(torch.cat([game.x, game.y]).norm()) == pytest.approx(norm, rel=1e-4)


def test_mixed_strategies():
    game = MatrixGame(
        [[0.0, -1.0, 2.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]],
        mixed=True,
        rounds=50,
        optimizer=lambda params: OptimisticOMD(params, lr=0.1, step_size="constant", mirror="entropy"),
    )
    trainer = Trainer(**QUIET)
    trainer.fit(game)
    assert float(game.x.sum()) == pytest.approx(1)
    assert 0 < float(trainer.callback_metrics["train/gap/duality"]) < 2


def test_gan_gradient_is_the_simultaneous_gradient():
    """Each player's gradient of the sum is that of its own loss with the other's weights fixed."""
    gan = RingGAN(hidden_features=(8,), batch_size=32)
    gan.log = lambda *_, **__: None
    torch.manual_seed(0)
    gan.training_step(torch.zeros(1), 0).backward()
    ours = {name: p.grad.clone() for name, p in gan.named_parameters()}
    for player in ("discriminator", "generator"):
        gan.zero_grad()
        torch.manual_seed(0)
        picks = torch.randint(8, (32,))
        real = gan.centers[picks] + gan.std * torch.randn(32, 2)
        fake = gan(torch.randn(32, 16))
        softplus = torch.nn.functional.softplus
        if player == "discriminator":
            loss = softplus(-gan.discriminator(real)).mean() + softplus(gan.discriminator(fake)).mean()
        else:
            loss = softplus(-gan.discriminator(fake)).mean()
        loss.backward()
        for name, p in getattr(gan, player).named_parameters():
            torch.testing.assert_close(ours[f"{player}.{name}"], p.grad)
