from pathlib import Path

import lightning as L
import pytest

from lit_methods.callbacks import ConvergenceCurves
from lit_methods.games import PreferenceGame


def test_one_point_per_batch_and_a_picture(tmp_path: Path) -> None:
    curves = ConvergenceCurves(["kl", "exploitability"], name="game")
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=2, logger=False, callbacks=[curves],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    game = PreferenceGame([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], [0.7, 0.2, 0.1], num_iterations=5)
    trainer.fit(game)
    assert (tmp_path / "game.png").stat().st_size > 10_000
    assert len(curves.points) == 9
    assert {len(values) for values in curves.points.values()} == {10}
    bound = curves.points["train/kl/bound"]
    assert bound[-1] == pytest.approx(bound[0] * 1.02**-9, rel=1e-5)
    again = ConvergenceCurves(["kl"], name="game")
    again.load_state_dict(curves.state_dict())
    assert again.points == curves.points
