import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_methods.callbacks import LearningCurves
from tests.contract.callback_checks import UnrelatedModule


def trainer_in(folder, *callbacks, **arguments) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "default_root_dir": folder, "logger": False, "log_every_n_steps": 1}
    return Trainer(**quiet | defaults | arguments, callbacks=list(callbacks))


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_points_are_taken_per_epoch_and_per_validation(tmp_path) -> None:
    curves = LearningCurves()
    trainer = trainer_in(tmp_path, curves, max_epochs=2, val_check_interval=1)
    trainer.fit(UnrelatedModule())
    assert [step for step, _ in curves.points["loss"]] == [3, 6]
    assert [step for step, _ in curves.points["val_loss"]] == [1, 2, 3, 4, 5, 6]
    assert curves.points["val_loss"][-1][1] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert is_png(tmp_path / "learning_curves.png")


def test_only_chosen_metrics_are_drawn_under_the_chosen_name(tmp_path) -> None:
    curves = LearningCurves(metrics=["loss"], name="training")
    trainer_in(tmp_path, curves, max_epochs=1).fit(UnrelatedModule())
    assert list(curves.points) == ["loss"]
    assert is_png(tmp_path / "training.png")


def test_curve_continues_after_resuming(tmp_path) -> None:
    first = trainer_in(tmp_path, LearningCurves(), max_epochs=2)
    first.fit(UnrelatedModule())
    first.save_checkpoint(tmp_path / "two.ckpt")
    curves = LearningCurves()
    trainer_in(tmp_path, curves, max_epochs=4).fit(UnrelatedModule(), ckpt_path=tmp_path / "two.ckpt")
    assert [step for step, _ in curves.points["loss"]] == [3, 6, 9, 12]


def test_two_curves_keep_their_states_apart() -> None:
    assert LearningCurves(name="a").state_key != LearningCurves(name="b").state_key


def test_curves_are_drawn_after_a_crash(tmp_path) -> None:
    class Crashing(UnrelatedModule):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        trainer_in(tmp_path, LearningCurves(), max_epochs=5).fit(Crashing())
    assert is_png(tmp_path / "learning_curves.png")


def test_figures_reach_tensorboard(tmp_path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer_in(tmp_path, LearningCurves(), max_epochs=1, logger=logger).fit(UnrelatedModule())
    assert is_png(tmp_path / "run" / "learning_curves.png")
    events = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("events*"))
    assert b"learning_curves" in events


def test_nothing_is_drawn_without_logged_metrics(tmp_path) -> None:
    class Silent(UnrelatedModule):
        def training_step(self, batch, batch_idx) -> torch.Tensor:
            return self.layer(batch[0]).square().mean()

        validation_step = None  # type: ignore[assignment]

    trainer_in(tmp_path, LearningCurves(), max_epochs=1).fit(Silent())
    assert not (tmp_path / "learning_curves.png").exists()


class LogsMuch(UnrelatedModule):
    """Numbered metrics, a constant one, and many panels."""

    def on_train_epoch_end(self) -> None:
        epoch = float(self.current_epoch)
        self.log_dict({"train/kl/1": epoch, "train/kl/2": 2 * epoch, "train/lr": 0.1, "train/a": epoch, "val/a": epoch})
        self.log_dict({f"train/{name}": epoch for name in ("b", "c")})


def test_panels_stand_in_rows_numbers_share_one_and_constants_are_left_out(tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(
        "lit_methods.callbacks.learning_curves.save_figure", lambda trainer, figure, *_: drawn.append(figure)
    )
    trainer_in(tmp_path, LearningCurves(), max_epochs=3).fit(LogsMuch())
    (figure,) = drawn
    assert {axes.get_title() for axes in figure.axes} == {"kl", "a", "b", "c", "loss", "val_loss"}
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 3)
    kl = next(axes for axes in figure.axes if axes.get_title() == "kl")
    assert [line.get_label() for line in kl.lines] == ["train/kl/1", "train/kl/2"]
