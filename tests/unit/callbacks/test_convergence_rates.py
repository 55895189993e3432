import math

import pytest
from lightning.pytorch import LightningModule, Trainer

from lit_methods.callbacks import ConvergenceRates
from tests.contract.callback_checks import UnrelatedModule
from tests.unit.callbacks.test_learning_curves import is_png


class KnownErrors(UnrelatedModule):
    def validation_step(self, batch, batch_idx):
        step = max(self.global_step, 1)
        self.log("val/power", 3 * step**-2.0)
        self.log("val/exponential", 5 * math.exp(-0.1 * step))
        self.log("val/zero", 0.0)


def fit(module: LightningModule, callback: ConvergenceRates, folder) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=8,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback],
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(module)


def test_known_laws_are_found(tmp_path, capsys) -> None:
    callback = ConvergenceRates(["val/power", "val/exponential", "val/zero"], from_step=2)
    fit(KnownErrors(), callback, tmp_path)
    power, exponential = callback.rates["val/power"], callback.rates["val/exponential"]
    assert power["slope"] == pytest.approx(-2, abs=1e-4)
    assert power["slope_r2"] == pytest.approx(1, abs=1e-6)
    assert power["rate_r2"] < 0.95
    assert exponential["rate"] == pytest.approx(-0.1, abs=1e-5)
    assert exponential["rate_r2"] == pytest.approx(1, abs=1e-6)
    assert exponential["last"] == pytest.approx(5 * math.exp(-2.4))
    assert "val/zero" not in callback.rates, "there is no line through zeros"
    assert "val/power" in capsys.readouterr().out
    assert is_png(tmp_path / "convergence_rates.png")


def test_points_below_the_floor_are_left_out(tmp_path) -> None:
    callback = ConvergenceRates(["val/exponential"], floor=5 * math.exp(-0.1 * 7))
    fit(KnownErrors(), callback, tmp_path)
    assert callback.rates == {}, "two points make no fit"
