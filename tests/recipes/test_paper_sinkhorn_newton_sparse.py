"""The MNIST recipe has the paper's regularisation and size, runs on files of MNIST's layout, and names missing ones."""

import pytest
import yaml

from tests.cli import run_here
from tests.contract.pieces import ROOT
from tests.standins.idx_files import write_mnist

NAME = "sinkhorn_newton_sparse/paper_tables"


def test_settings() -> None:
    config = yaml.safe_load((ROOT / "recipes" / f"{NAME}.yaml").read_text())
    table = config["trainer"]["callbacks"][-1]["init_args"]
    assert table == {"eta": 1200.0, "assignment_size": 500, "image_size": 28}
    assert config["data"]["class_path"].endswith("MNISTDataModule")


def test_runs_on_files_of_mnists_layout(tmp_path, monkeypatch, capsys) -> None:
    write_mnist(tmp_path)
    tiny = [
        "--data.data_dir=.", "--data.val_size=8", "--data.batch_size=8", "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2", "--trainer.callbacks.assignment_size=20", "--trainer.callbacks.eta=100",
        "--trainer.callbacks.image_size=8",
    ]  # fmt: skip
    run_here(monkeypatch, tmp_path, "fit", "--config", NAME, *tiny)
    assert "images, L1 cost" in capsys.readouterr().out


def test_names_the_missing_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lit_methods.datamodules.images.mnist.fetch", _offline)
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        run_here(monkeypatch, tmp_path, "fit", "--config", NAME)


def _offline(*_: object) -> None:
    raise OSError("no network")
