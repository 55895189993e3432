import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_methods.callbacks import ResultTable
from tests.contract.callback_checks import UnrelatedModule


class GetsWorse(UnrelatedModule):
    """Its last epoch is not its best."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            for p in self.parameters():
                p.data.mul_(-20.0)


def fit(folder, table, *callbacks) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = Trainer(**quiet, max_epochs=3, default_root_dir=folder, callbacks=[table, *callbacks])
    trainer.fit(GetsWorse())
    return trainer


def test_best_checkpoint_is_evaluated_and_printed_once(tmp_path, capsys) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    table = ResultTable()
    trainer = fit(tmp_path, table, checkpoint)
    assert checkpoint.best_model_score is not None
    assert table.results == {"test_loss": pytest.approx(float(checkpoint.best_model_score), rel=1e-5)}
    out = capsys.readouterr().out
    assert out.count("test_loss") == 1
    assert f"{table.results['test_loss']:.4f}" in out
    assert checkpoint.best_model_path in out
    assert trainer.state.fn == "fit"
    assert trainer.state.finished


def test_last_weights_are_evaluated_when_no_checkpoint_is_monitored(tmp_path, capsys) -> None:
    table = ResultTable(stage="validate")
    fit(tmp_path, table)
    assert table.results["val_loss"] > 1.5
    assert "weights at the end of training" in capsys.readouterr().out
