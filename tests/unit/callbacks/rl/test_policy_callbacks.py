import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.image import imread
from scipy.stats import trim_mean
from torch import nn
from torch.utils.data import DataLoader

from lit_methods.batches import EpisodeBatch
from lit_methods.callbacks import LearningCurves, PolicyEvaluation, PolicyFrames
from lit_methods.callbacks.rl.policy_evaluation import bootstrap_interval, interquartile_mean
from tests.unit.datamodules.rl.test_environments import Agent


class Policy(LightningModule):
    """Its evaluation episodes are those it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        self.log("train/env_steps", 100.0 * (self.global_step + 1))
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/return", batch.returns.mean(), batch_size=len(batch.returns))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def act(self, observations, deterministic=False):
        assert deterministic
        return Agent(0.3).act(observations)


def episodes(*returns: float) -> DataLoader:
    batch = EpisodeBatch(torch.tensor(returns), torch.ones(len(returns)).long())
    return DataLoader([batch], batch_size=None)


def fit(folder, callbacks, epochs=2, **arguments):
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", max_epochs=epochs, callbacks=callbacks, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    module = Policy()
    train = DataLoader(torch.ones(3, 1))
    trainer.fit(module, train, episodes(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0), **arguments)
    return trainer, module


def test_statistics_and_curve(tmp_path):
    callback, curves = PolicyEvaluation(), LearningCurves(["val/return"], x="train/env_steps")
    trainer, module = fit(tmp_path, [callback, curves])
    assert [point[0] for point in callback.points] == [300, 600]
    assert float(trainer.callback_metrics["val/return_iqm"]) == 4.5
    _, mean, low, high = callback.points[0]
    assert mean == 16
    assert low < 10 < 16 < high
    assert imread(tmp_path / "policy_evaluation.png").std() > 0
    assert curves.points == {"val/return": [(300.0, 16.0), (600.0, 16.0)]}
    found = trainer.test(module, episodes(3.0, 3.0), verbose=False)[0]
    assert found["test/return_low"] == found["test/return_high"] == 3


def test_the_curve_goes_on_after_a_resume(tmp_path):
    trainer, _ = fit(tmp_path, [PolicyEvaluation()])
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    callback = PolicyEvaluation()
    fit(tmp_path, [callback], epochs=3, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert [point[0] for point in callback.points] == [300, 600, 900]


def test_interquartile_mean():
    values = np.random.default_rng(0).normal(size=20)
    assert interquartile_mean(values) == pytest.approx(trim_mean(values, 0.25))
    assert interquartile_mean(np.array([3.0])) == 3


def test_bootstrap_interval_covers():
    rng = np.random.default_rng(1)
    samples = rng.normal(5, 2, (200, 30))
    inside = [low <= 5 <= high for low, high in (bootstrap_interval(s, 0.9, 500) for s in samples)]
    assert 0.82 <= np.mean(inside) <= 0.95
    assert bootstrap_interval(samples[0], 0.9, 500) == bootstrap_interval(samples[0], 0.9, 500)


def test_frames_of_the_trained_policy(tmp_path):
    pytest.importorskip("pygame")
    fit(tmp_path, [PolicyFrames("Pendulum-v1", num_frames=3, env_kwargs={"max_episode_steps": 5})], epochs=1)
    assert imread(tmp_path / "policy_frames.png").shape[1] > 500
