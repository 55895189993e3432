"""Diagnostics of approximate posteriors."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributions import Beta

from lit_methods.batches import SupervisedBatch
from lit_methods.callbacks import CountAccuracy, PosteriorDiagnostics
from lit_methods.datamodules import RepeatedObservationDataModule, TensorDataModule
from lit_methods.vi import ProgrammableVI
from lit_methods.vi.programmable import program, sample
from lit_methods.vi.programmable.examples import BetaGuide, CoinModel, SceneGuide, SceneModel, VAEGuide, VAEModel

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
FLIPS = [1.0] * 6 + [0.0] * 4


def validate(module, data, callback, folder) -> dict[str, float]:
    torch.manual_seed(0)
    trainer = Trainer(**QUIET, default_root_dir=folder, callbacks=[callback])
    return trainer.validate(module, data, verbose=False)[0]


def test_an_exact_guide_has_the_evidence_and_perfect_weights(tmp_path) -> None:
    exact = program(lambda batch: sample("theta", Beta(16.0, 14.0)))
    callback = PosteriorDiagnostics(num_particles=50)
    found = validate(ProgrammableVI(CoinModel(), exact), RepeatedObservationDataModule(FLIPS), callback, tmp_path)
    assert found["vi/elbo"] == pytest.approx(-7.06937, abs=1e-4)
    assert found["vi/log_evidence"] == pytest.approx(-7.06937, abs=1e-4)
    assert found["vi/ess"] == pytest.approx(1, abs=1e-4)
    assert found["vi/k_hat_bad"] == 0
    assert (tmp_path / "posterior_predictive.png").exists()
    other = PosteriorDiagnostics()
    other.load_state_dict(callback.state_dict())
    assert other.history == callback.history
    assert len(other.history) == 1


def test_a_bad_guide_is_found_out(tmp_path) -> None:
    found = validate(
        ProgrammableVI(CoinModel(), BetaGuide(300.0, 20.0)), RepeatedObservationDataModule(FLIPS),
        PosteriorDiagnostics(num_particles=500), tmp_path,
    )  # fmt: skip
    assert found["vi/k_hat"] > 0.7
    assert found["vi/ess"] < 0.1
    assert found["vi/elbo"] < found["vi/log_evidence"]


def test_images_are_drawn(tmp_path) -> None:
    rows = SupervisedBatch(torch.rand(6, 1, 8, 8).round(), torch.zeros(6, dtype=torch.int64))
    callback = PosteriorDiagnostics(num_particles=25, num_predictive=4, image_shape=(8, 8), name="digits")
    module = ProgrammableVI(VAEModel(64, 4, 16), VAEGuide(64, 4, 16))
    validate(module, TensorDataModule(val=rows), callback, tmp_path)
    assert (tmp_path / "digits.png").exists()


def test_counts_are_compared(tmp_path) -> None:
    sizes = {"image_size": 8, "object_size": 4, "what_dim": 2, "hidden_dim": 4}
    guide = SceneGuide(["enum", "enum"], encoder_dim=4, **sizes)
    with torch.no_grad():
        guide.predict.weight.zero_()
        guide.predict.bias[0] = 30.0  # both are present
    module = ProgrammableVI(SceneModel([0.5, 0.5], **sizes), guide)
    rows = SupervisedBatch(torch.rand(8, 1, 8, 8), torch.tensor([2, 2, 2, 1, 0, 2, 2, 2]))
    found = validate(module, TensorDataModule(val=rows), CountAccuracy(["z_pres_0", "z_pres_1"]), tmp_path)
    assert found["val/count_accuracy"] == 0.75
    with pytest.raises(ValueError, match=r"sites must be among those of the guide, .*got \['z'\] too"):
        validate(module, TensorDataModule(val=rows), CountAccuracy(["z"]), tmp_path)


@pytest.mark.parametrize("callback", [PosteriorDiagnostics(), CountAccuracy(["z"])], ids=lambda c: type(c).__name__)
def test_other_modules_are_refused(callback, tmp_path) -> None:
    with pytest.raises(TypeError, match="the module must be a ProgrammableVI, got LightningModule"):
        callback.setup(None, LightningModule(), "fit")
