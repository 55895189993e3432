import pytest
import torch

from lit_methods.datamodules import CovertypeDataModule
from tests.cli import run_here
from tests.standins.covertype_files import write_covertype


def test_rounds_are_the_rows_of_the_file(tmp_path):
    write_covertype(tmp_path)
    data = CovertypeDataModule(tmp_path, download=False, samples_per_round=10)
    data.prepare_data()
    data.setup("fit")
    stream = data.stream()
    assert stream.features.shape == (20, 10, 55)
    assert set(stream.targets.flatten().tolist()) == {-1, 1}
    flat = stream.features.flatten(0, 1)
    assert float(flat.norm(dim=1).max()) == pytest.approx(1)
    assert torch.equal(flat[:, 0] > 0, stream.targets.flatten() > 0)
    assert not flat[:, 53].any()
    later = data.stream(rank=2).features.flatten(0, 1)
    assert torch.equal(later[0], flat[6])  # 2/64 of 200 rows later


def test_missing_data_set(tmp_path):
    data = CovertypeDataModule(tmp_path, download=False)
    with pytest.raises(FileNotFoundError, match="copy its folder 'covertype' there"):
        data.setup("fit")


def test_paper_size_recipe_runs_on_a_small_file(tmp_path, monkeypatch):
    write_covertype(tmp_path)
    run_here(
        monkeypatch, tmp_path, "fit", "--config", "optimistic_omd/paper_covertype",
        "--data.data_dir=.", "--data.download=false", "--trainer.val_check_interval=10",
    )  # fmt: skip
