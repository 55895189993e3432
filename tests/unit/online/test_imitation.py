"""OnlineImitation on a real environment: rounds, mixtures, returns, exact resume, closed forms."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lit_methods.callbacks import ExactResume
from lit_methods.datamodules import ImitationDataModule
from lit_methods.nets import MLP, LinearFeedback
from lit_methods.online import OnlineImitation
from lit_methods.optim import SSO, ArmijoSGD
from lit_methods.optim.sso import ConjugateGradient

pytest.importorskip("gymnasium")
GAIN = [[-0.7224, -6.83, -0.9233, -1.0845]]


def make_data(**options) -> ImitationDataModule:
    arguments = {"samples_per_round": 30, "num_envs": 2, "eval_episodes": 2, "env_arguments": {"max_episode_steps": 40}}
    return ImitationDataModule("InvertedPendulum-v5", LinearFeedback(GAIN), **arguments | options)


def make_module(**options) -> OnlineImitation:
    torch.manual_seed(0)
    return OnlineImitation(MLP(4, [], 1), **options)


def make_trainer(folder: Path | None = None, epochs: int = 4, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"use_distributed_sampler": False, "reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0}
    if folder is None:
        return Trainer(**quiet | options, enable_checkpointing=False, max_epochs=epochs)
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    return Trainer(**quiet, max_epochs=epochs, callbacks=[ExactResume(), saves], **options)


def test_exact_sso_imitates_a_linear_expert_in_one_round() -> None:
    module = make_module(
        zero_init=True,
        optimizer=lambda p: SSO(p, lr=None, loss="mse", inner=ConjugateGradient(steps=30, tol=0.0)),
    )
    trainer = make_trainer(epochs=3)
    trainer.fit(module, make_data())
    assert trainer.callback_metrics["train/loss"] < 1e-5
    assert trainer.callback_metrics["val/return"] == trainer.callback_metrics["val/length"] == 40
    (weight, bias) = module.policy.parameters()
    torch.testing.assert_close(weight.detach(), -torch.tensor(GAIN), rtol=0.05, atol=0.05)
    torch.testing.assert_close(bias.detach(), torch.zeros(1), rtol=0, atol=0.01)


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.Adam(p, lr=0.1), ArmijoSGD], ids=["Adam", "ArmijoSGD"])
def test_other_optimizers_take_ordinary_steps_and_losses_add_up(optimizer) -> None:
    module = make_module(optimizer=optimizer)
    losses = []
    module.on_train_batch_end = lambda outputs, *_: losses.append(float(module.trainer.callback_metrics["train/loss"]))
    trainer = make_trainer()
    trainer.fit(module, make_data(beta=1.0))
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert float(module.cumulative_loss) == pytest.approx(sum(losses))


def test_beta_mixes_expert_and_learner() -> None:
    """Where the expert acts, the pendulum stays up; a policy that is 0 drops it."""
    spread = {}
    for beta in (0.0, 0.5, 1.0):
        module = make_module(zero_init=True, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        data = make_data(beta=beta, samples_per_round=300, num_envs=1, env_arguments={})
        make_trainer(epochs=1, limit_val_batches=0).fit(module, data)
        spread[beta] = float(data.train_data.observations.abs().max())
    assert max(spread[1.0], spread[0.5]) < 0.1 < spread[0.0], "half of the time is enough to keep it up"
    assert spread[1.0] != spread[0.5]
    data = make_data(beta=1.0, beta_decay=0.0, samples_per_round=100, env_arguments={})
    module = make_module(zero_init=True, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    make_trainer(epochs=1, limit_val_batches=0).fit(module, data)
    by_expert, by_learner = data.play(0), data.play(1)
    assert by_learner.observations.abs().max() > 2 * by_expert.observations.abs().max()


def test_aggregation_keeps_earlier_rounds() -> None:
    sizes = {}
    for aggregate in (False, True):
        data = make_data(aggregate=aggregate)
        make_trainer(epochs=3, limit_val_batches=0).fit(make_module(), data)
        sizes[aggregate] = len(data.train_data.observations)
    assert sizes == {False: 30, True: 90}


def test_a_second_fit_plays_its_own_rounds_and_a_trainer_that_never_reloads_is_told() -> None:
    data = make_data(aggregate=True)
    for _ in range(2):
        make_trainer(epochs=1, limit_val_batches=0).fit(make_module(), data)
        assert len(data.train_data.observations) == 30
    with pytest.warns(UserWarning, match="reload_dataloaders_every_n_epochs=1"):
        make_trainer(epochs=1, limit_val_batches=0, reload_dataloaders_every_n_epochs=0).fit(make_module(), data)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path) -> None:
    make_trainer(tmp_path, epochs=1).fit(make_module(), make_data())
    with pytest.raises(ValueError, match=r"with beta=0.0 \(now 0.5\)"):
        make_trainer(epochs=2).fit(make_module(), make_data(beta=0.5), ckpt_path=str(tmp_path / "step=1.ckpt"))


def test_whole_episodes_count_the_learners_reward() -> None:
    data = make_data(eval_episodes=3)
    (batch,) = data.val_dataloader()  # without a Trainer the expert acts
    assert batch.ends.sum() == 3
    assert len(batch.rewards) == batch.rewards.sum() == 120
    torch.testing.assert_close(batch.actions, -batch.observations @ torch.tensor(GAIN).T)
    (other,) = data.test_dataloader()
    assert not torch.equal(other.observations, batch.observations)


def test_squashed_actions_reach_the_bounds() -> None:
    class Strong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x), 1), 100.0)

    clipped = ImitationDataModule("InvertedPendulum-v5", Strong(), samples_per_round=3).play(0)
    squashed = ImitationDataModule("InvertedPendulum-v5", Strong(), samples_per_round=3, actions="tanh").play(0)
    assert torch.equal(clipped.observations, squashed.observations)
    assert squashed.actions.unique().tolist() == [100.0], "labels are the expert's own, before squashing"


@pytest.mark.parametrize("options", [{}, {"aggregate": True, "beta": 0.5, "beta_decay": 0.9}, {"batch_size": 8}])
def test_resumes_to_the_bit_between_and_within_rounds(tmp_path, options) -> None:
    whole = make_module()
    make_trainer(tmp_path / "whole").fit(whole, make_data(**options))
    middle = 5 if "batch_size" in options else 2
    resumed = make_module()
    make_trainer(tmp_path / "resumed").fit(
        resumed, make_data(**options), ckpt_path=str(tmp_path / "whole" / f"step={middle}.ckpt"), weights_only=True
    )
    for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(resumed.cumulative_loss, whole.cumulative_loss)


def test_refuses_other_spaces_and_settings() -> None:
    with pytest.raises(ValueError, match="env='CartPole-v1': needs vectors of observations and bounded actions"):
        ImitationDataModule("CartPole-v1", LinearFeedback(GAIN)).setup("fit")
    with pytest.raises(ValueError, match="gain must be a matrix"):
        LinearFeedback([[1.0], [1.0, 2.0]])
