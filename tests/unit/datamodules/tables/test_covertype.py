from pathlib import Path

import joblib
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
    with pytest.raises(
        FileNotFoundError, match=r"lacks covtype\.data\.gz in .* Put https://archive.*covtype\.data\.gz"
    ):
        data.setup("fit")


def test_pickles_of_scikit_learn_are_not_read(tmp_path):
    """They run what their writer wants."""

    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    (tmp_path / "covertype").mkdir()
    for name in ("samples_py3", "targets_py3", "samples", "targets"):
        joblib.dump(Harmful(), tmp_path / "covertype" / name)
    data = CovertypeDataModule(tmp_path, download=False)
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match="pickles, which are not read"):
        data.setup("fit")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("damage", [b"", b"text", b"1,2,3\n", b"1," * 54 + b"8\n", b"nan," * 54 + b"2\n"])
def test_damaged_files_are_named(damage, tmp_path):
    (tmp_path / "covtype.data").write_bytes(damage)
    with pytest.raises(ValueError, match=r"covtype\.data (is damaged|must hold 54 finite numbers)"):
        CovertypeDataModule(tmp_path).setup("fit")


def test_truncated_archives_are_named(tmp_path):
    write_covertype(tmp_path)
    path = tmp_path / "covtype.data.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"covtype\.data\.gz is damaged or not the cover type table \(EOFError"):
        CovertypeDataModule(tmp_path).setup("fit")


def test_paper_size_recipe_runs_on_a_small_file(tmp_path, monkeypatch):
    write_covertype(tmp_path)
    run_here(
        monkeypatch, tmp_path, "fit", "--config", "optimistic_omd/paper_covertype",
        "--data.data_dir=.", "--data.download=false", "--trainer.val_check_interval=10",
    )  # fmt: skip
