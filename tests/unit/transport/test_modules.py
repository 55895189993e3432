"""What the modules learn on problems with known answers."""

import math

import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.batches import PointSetBatch, SupervisedBatch
from lit_methods.datamodules import DigitPointsDataModule, TensorDataModule
from lit_methods.nets import MLP
from lit_methods.transport import OTGenerator, PointRegistration

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def test_registration_finds_the_motion_of_digits():
    """Turned by 30 degrees and shifted by (0.5, -0.3)."""
    data = DigitPointsDataModule(num_points=32, batch_size=32)
    module = PointRegistration(eta=20.0, optimizer=lambda params: torch.optim.SGD(params, lr=0.2))
    trainer = Trainer(**QUIET, max_steps=60)
    trainer.fit(module, data)
    rotation = module.rotation().detach()
    assert math.degrees(math.atan2(rotation[1, 0], rotation[0, 0])) == pytest.approx(30, abs=2)
    torch.testing.assert_close(module.translation.detach(), torch.tensor([0.5, -0.3]), atol=0.02, rtol=0)
    results = trainer.test(module, data, verbose=False)[0]
    assert results["test/angle"] == pytest.approx(30, abs=2)
    assert results["test/distance"] < 0.35  # two draws of 32 points from the same image are 0.29 apart
    predicted = trainer.predict(module, data)
    torch.testing.assert_close(predicted[0], module(data.test_data.source[:32]).detach())


def test_rotations_are_rotations_in_any_dimension():
    module = PointRegistration(4)
    torch.nn.init.normal_(module.skew)
    rotation = module.rotation()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), atol=1e-5, rtol=0)
    assert float(torch.linalg.det(rotation).detach()) == pytest.approx(1, abs=1e-5)


def test_generator_learns_a_shifted_normal_distribution():
    torch.manual_seed(0)
    x = torch.randn(128, 2) * torch.tensor([2.0, 0.5]) + torch.tensor([3.0, -1.0])
    data = TensorDataModule(train=SupervisedBatch(x, x), val=SupervisedBatch(x, x), batch_size=64)
    module = OTGenerator(MLP(2, [], 2), 2, optimizer=lambda params: torch.optim.Adam(params, lr=0.1))
    trainer = Trainer(**QUIET, max_epochs=40)
    before = trainer.validate(module, data, verbose=False)[0]["val/distance"]
    trainer.fit(module, data)
    after = trainer.validate(module, data, verbose=False)[0]["val/distance"]
    assert after < 0.25 * before
    made = module.generate(4000).detach()
    torch.testing.assert_close(made.mean(0), x.mean(0), atol=0.3, rtol=0)
    torch.testing.assert_close(made.std(0), x.std(0), atol=0.4, rtol=0)


def test_digit_points_lie_where_the_ink_is():
    data = DigitPointsDataModule(num_points=500, angle=0.0, shift=(0.0, 0.0), test_size=1, val_size=1790)
    data.setup("fit")
    batch = data.train_data
    assert isinstance(batch, PointSetBatch)
    assert batch.source.shape == batch.target.shape == (6, 500, 2)
    assert float(batch.source.abs().max()) <= 1
    torch.testing.assert_close(batch.source.mean(1), batch.target.mean(1), atol=0.12, rtol=0)
    turned = DigitPointsDataModule(num_points=500, angle=90.0, shift=(1.0, 0.0), test_size=1, val_size=1790)
    turned.setup("fit")
    expected = torch.stack([1 - batch.target[..., 1], batch.target[..., 0]], -1)
    torch.testing.assert_close(turned.train_data.target, expected, atol=1e-5, rtol=0)
