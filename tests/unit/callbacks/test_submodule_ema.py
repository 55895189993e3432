from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_methods.callbacks import SubmoduleEMA

BATCHES = 12


class TwoParts(LightningModule):
    """``student`` is stepped every second batch, ``critic`` in the others; notes what validation and test see."""

    def __init__(self, alternate: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = not alternate
        self.student, self.critic = nn.Linear(1, 1), nn.Linear(1, 1)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.seen: list[float] = []
        self.path: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count += 1
        loss = (self.student(batch) + self.critic(batch)).square().mean()
        if not self.automatic_optimization:
            optimizer = self.optimizers()[batch_idx % 2]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.path.append(float(self.student.weight))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(float(self.student.weight))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        parts = (self.student, self.critic) if not self.automatic_optimization else (self,)
        optimizers = [torch.optim.Adam(part.parameters(), lr=0.1, fused=True) for part in parts]
        return optimizers if len(optimizers) > 1 else optimizers[0]


def trainer(*callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**quiet, enable_checkpointing=False, callbacks=list(callbacks), **{"max_epochs": 1, **settings})


def data() -> DataLoader:
    return DataLoader(torch.linspace(-1, 1, BATCHES)[:, None], batch_size=1)


def averages_of(path: list[float], decay: float) -> float:
    average = path[0]
    for value in path[1:]:
        average = decay * average + (1 - decay) * value
    return average


def test_averages_the_part_after_every_step_and_evaluates_with_it() -> None:
    ema = SubmoduleEMA("student", decays=[0.5, 0.9], evaluate=1)
    model = TwoParts()
    run = trainer(ema)
    run.fit(model, data(), data())
    for decay, average in zip((0.5, 0.9), ema.averages, strict=True):
        assert float(average["weight"]) == pytest.approx(averages_of(model.path, decay), rel=1e-5)
    expected = averages_of(model.path, 0.9)
    assert model.seen[-1] == pytest.approx(expected, rel=1e-5)
    assert model.seen[0] != pytest.approx(expected)  # the sanity check saw the first weights
    model.seen.clear()
    run.test(model, data(), verbose=False)
    assert model.seen[0] == float(model.student.weight) == pytest.approx(expected, rel=1e-5)
    assert set(ema.averages[0]) == {"weight", "bias"}


def test_one_update_for_each_optimizer_step_under_accumulation() -> None:
    ema = SubmoduleEMA("student")
    trainer(ema, accumulate_grad_batches=4).fit(TwoParts(), data())
    assert ema.steps == 3


def test_only_steps_of_the_part_count() -> None:
    ema = SubmoduleEMA("student", decays=[0.5])
    model = TwoParts(alternate=True)
    trainer(ema).fit(model, data())
    assert ema.steps == BATCHES // 2
    assert float(ema.averages[0]["weight"]) == pytest.approx(averages_of(model.path[::2], 0.5), rel=1e-5)


def test_power_schedule() -> None:
    ema = SubmoduleEMA("student", decays=[6.94], schedule="power")
    model = TwoParts()
    trainer(ema).fit(model, data())
    average = model.path[0]
    for k, value in enumerate(model.path[1:], 2):
        decay = (1 - 1 / k) ** 7.94
        average = decay * average + (1 - decay) * value
    assert float(ema.averages[0]["weight"]) == pytest.approx(average, rel=1e-5)


def test_checkpoints_hold_the_average_and_resume_from_raw_weights(tmp_path: Path) -> None:
    for start_step in (0, 8):  # the checkpoint is written after 6 steps: after and before the first average
        whole, whole_ema = TwoParts(), SubmoduleEMA("student", decays=[0.5, 0.9], start_step=start_step)
        trainer(whole_ema, max_epochs=2).fit(whole, data())

        first, ema = TwoParts(), SubmoduleEMA("student", decays=[0.5, 0.9], start_step=start_step)
        run = trainer(ema)
        run.fit(first, data())
        raw = first.path[-1]
        run.save_checkpoint(tmp_path / "half.ckpt")
        saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
        assert float(saved["state_dict"]["student.weight"]) == pytest.approx(averages_of(first.path[start_step:], 0.5))
        assert float(saved["current_model_state"]["student.weight"]) == raw
        assert int(saved["state_dict"]["count"]) == BATCHES
        loaded = TwoParts.load_from_checkpoint(tmp_path / "half.ckpt")
        assert torch.equal(loaded.student.weight, saved["state_dict"]["student.weight"])

        resumed, resumed_ema = TwoParts(), SubmoduleEMA("student", decays=[0.5, 0.9], start_step=start_step)
        trainer(resumed_ema, max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt")
        assert resumed.path == whole.path[BATCHES:]
        for mine, theirs in zip(resumed_ema.averages, whole_ema.averages, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_before_the_first_update_raw_weights_are_evaluated_and_saved(tmp_path: Path) -> None:
    ema = SubmoduleEMA("student", start_step=1000)
    model = TwoParts()
    run = trainer(ema)
    run.fit(model, data(), data())
    assert model.seen[-1] == model.path[-1]
    run.save_checkpoint(tmp_path / "raw.ckpt")
    saved = torch.load(tmp_path / "raw.ckpt", weights_only=True)
    assert float(saved["state_dict"]["student.weight"]) == model.path[-1]


def test_refuses_a_checkpoint_without_its_averages(tmp_path: Path) -> None:
    run = trainer()
    run.fit(TwoParts(), data())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="the checkpoint must have the averages of target 'student', but has none"):
        trainer(SubmoduleEMA("student"), max_epochs=2).fit(TwoParts(), data(), ckpt_path=tmp_path / "plain.ckpt")


def test_refuses_a_module_without_the_part() -> None:
    with pytest.raises(ValueError, match=r"target must name a part of the module such as \['student', 'critic'\], got"):
        trainer(SubmoduleEMA("teacher")).fit(TwoParts(), data())
