import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.datamodules import SEADataModule
from lit_methods.online import OnlineLearning, run_online
from lit_methods.optim import Ball, ImplicitOMD, OptimisticOMD

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
    "max_epochs": 1,
}


def learner(params):
    return OptimisticOMD(params, lr=2.0, grad_bound=1.3, constraint=Ball(1.0))


@pytest.mark.parametrize("loss", ["linear", "least_squares", "logistic"])
def test_trainer_and_plain_loop_agree(loss):
    data = SEADataModule("drift", loss, dim=5, rounds=60, noise=0.3, dtype="float64")
    module = OnlineLearning(5, loss, optimizer=learner)
    trainer = Trainer(**QUIET, precision="64-true", val_check_interval=30)
    trainer.fit(module, data)
    trace = run_online(learner, data.stream(), loss)
    logged = trainer.callback_metrics
    assert float(logged["val/regret"]) == pytest.approx(trace.regret(loss, data.stream(), 1.0), rel=1e-6)
    assert float(logged["val/dynamic_regret"]) == pytest.approx(trace.dynamic_regret(loss, data.stream()), rel=1e-5)
    assert float(logged["val/gradient_variation"]) == pytest.approx(float(trace.gradient_variation), rel=1e-6)
    assert float(logged["val/path_length"]) == pytest.approx(data.path_length, rel=1e-6)
    assert float(logged["train/loss"]) == pytest.approx(float(trace.losses[-1]), rel=1e-6)
    scores = trainer.predict(module, data)[0]
    torch.testing.assert_close(scores, module(data.test_data.features[0]).detach())


def test_learners_that_look_several_times_are_scored_once():
    data = SEADataModule(loss="abs", dim=3, rounds=20)
    module = OnlineLearning(3, "abs", optimizer=lambda params: ImplicitOMD(params, inner_steps=2))
    Trainer(**QUIET).fit(module, data)
    assert sum(map(len, module.regret.weights)) == 20


def test_regret_of_a_prefix():
    data = SEADataModule(dim=5, rounds=60, noise=0.3, dtype="float64")
    trace = run_online(learner, data.stream(), "linear", start=torch.full((5,), 0.1, dtype=torch.float64))
    assert float(trace.points[0, 0]) == pytest.approx(0.1)
    total = trace.losses[:10].sum() + data.stream().features[:10, 0].sum(0).norm()
    assert trace.regret("linear", data.stream(), 1.0, upto=10) == pytest.approx(float(total))
