import math

import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.black_box import GrandCanyon, LandscapeMinimization
from lit_methods.black_box.langevin import AnnealedLangevin
from lit_methods.callbacks import LandscapePaths
from lit_methods.optim import CBO, ConsensusHopping

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def test_particles_pass_the_barrier_and_gradients_do_not(tmp_path) -> None:
    """The message of arXiv 2306.09778 in one table, with the authors' settings and fewer runs."""
    torch.manual_seed(0)
    around = {"init_std": 0.5, "init_around_current": True, "particle_batch_size": None, "stall_tol": 0.0}
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


def test_langevin_is_gradient_descent_with_noise_that_dies_down() -> None:
    x = torch.nn.Parameter(torch.zeros(50_000))
    optimizer = AnnealedLangevin([x], lr=0.04, sigma=2.0)
    for k in (1, 2, 3):
        x.data.zero_()
        x.grad = torch.full_like(x, 5.0)
        optimizer.step()
        assert float(x.detach().mean()) == pytest.approx(-0.2, abs=0.02)
        assert float(x.detach().std()) == pytest.approx(2.0 / math.log(k + 1) * 0.2, rel=0.02)
    with pytest.raises(ValueError, match="lr and sigma must be"):
        AnnealedLangevin([x], lr=-1.0)
