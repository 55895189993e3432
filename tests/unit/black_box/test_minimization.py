import math

import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.black_box import GrandCanyon, LandscapeMinimization
from lit_methods.callbacks import LandscapePaths
from lit_methods.optim import CBO, ConsensusHopping
from lit_methods.optim.cbo import InitialCloud, ParticleBatches

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def test_particles_pass_the_barrier_and_gradients_do_not(tmp_path) -> None:
    """The message of arXiv 2306.09778 in one table, with the authors' settings and fewer runs."""
    torch.manual_seed(0)
    around = {"init": InitialCloud(0.5, True), "batches": ParticleBatches(None), "stall_tol": 0.0}
    module = LandscapeMinimization(
        GrandCanyon(),
        {
            "cbo": lambda p: CBO(p, lr=0.01, sigma=1.6, noise="isotropic", num_particles=200, alpha=100.0, **around),
            "wide": lambda p: ConsensusHopping(p, width=0.7),
            "narrow": lambda p: ConsensusHopping(p, width=0.4),
            "gradient": lambda p: torch.optim.SGD(p, lr=0.01),
        },
        start=[8.0, 8.0],
        num_runs=5,
        inner_steps={"gradient": 4},
        steps_per_epoch=250,
    )
    paths = LandscapePaths(every_n_steps=10)
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, callbacks=[paths], **QUIET)
    trainer.fit(module)
    assert trainer.global_step == 250
    metrics = trainer.callback_metrics
    assert metrics["val/success/cbo"] == 1
    assert metrics["val/success/wide"] >= 0.8
    assert metrics["val/success/narrow"] == 0
    assert metrics["val/success/gradient"] == 0
    assert metrics["val/value/gradient"] == pytest.approx(3.8623, abs=1e-3)
    assert metrics["val/distance/gradient"] == pytest.approx(math.hypot(2.3363, 2.4663), abs=1e-2)
    assert (tmp_path / "landscape_paths.png").stat().st_size > 20_000
    assert {name: len(path) for name, path in paths.paths.items()} == dict.fromkeys(module.methods, 26)
    assert torch.equal(paths.paths["cbo"][0], torch.full((5, 2), 8.0))
    positions = module.positions()["cbo"]
    assert positions.unique(dim=0).shape == (5, 2), "runs of one method must be independent"
