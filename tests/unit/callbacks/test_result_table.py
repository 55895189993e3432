import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_methods.callbacks import ResultTable
from tests.contract.callback_checks import UnrelatedModule

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}


class GetsWorse(UnrelatedModule):
    """Its last epoch is not its best."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            for p in self.parameters():
                p.data.mul_(-20.0)


def fit(folder, table, *callbacks) -> Trainer:
    trainer = Trainer(**QUIET, max_epochs=3, default_root_dir=folder, callbacks=[table, *callbacks])
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


class OnlyTrains(LightningModule):
    """Somebody's module without evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx) -> torch.Tensor:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validates(OnlyTrains):
    def validation_step(self, batch, batch_idx) -> None:
        self.log("val_loss", self.layer(batch).square().mean())


@pytest.mark.parametrize(
    ("module", "loaders", "message", "results"),
    [
        (OnlyTrains, 1, "OnlyTrains or its data have no test loop: ResultTable leaves the table out", set()),
        (Validates, 1, "ResultTable leaves the table out", set()),
        (Validates, 2, "Validates or its data have no test loop: ResultTable evaluates in validation", {"val_loss"}),
    ],
)
def test_a_module_or_data_without_a_test_loop(tmp_path, capsys, module, loaders, message, results) -> None:
    table = ResultTable()
    trainer = Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path, callbacks=[table])
    with pytest.warns(UserWarning, match=message):
        trainer.fit(module(), *[torch.utils.data.DataLoader(torch.ones(4, 1)) for _ in range(loaders)])
    assert table.results.keys() == results
    assert ("val_loss" in capsys.readouterr().out) == bool(results)
