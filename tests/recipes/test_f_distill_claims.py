"""The claim of recipes/f_distill/gaussian_student; by hand with ``-m slow``."""

import csv
from pathlib import Path

import pytest

from tests.cli import run_here
from tests.contract.pieces import ROOT


def moments(folder: Path, monkeypatch: pytest.MonkeyPatch, divergence: str) -> tuple[float, float]:
    """Mean and standard deviation of the trained student's samples."""
    config = str(ROOT / "recipes" / "f_distill" / "gaussian_student.yaml")
    run_here(monkeypatch, folder, "fit", "--config", config, "--model.divergence", divergence)
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        (row,) = (row for row in csv.DictReader(file) if row["test/std"])
    return float(row["test/mean"]), float(row["test/std"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_divergence_decides_how_much_a_gaussian_covers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for divergence in ("softened_rkl", "rkl", "js", "kl"):
        (tmp_path / divergence).mkdir()
        found[divergence] = moments(tmp_path / divergence, monkeypatch, divergence)
    std = {name: s for name, (_, s) in found.items()}
    assert std["softened_rkl"] < std["rkl"] < std["js"] <= std["kl"] + 0.05, found
    assert std["kl"] == pytest.approx(1.9, abs=0.1)
    assert found["kl"][0] == pytest.approx(-0.3, abs=0.1)
