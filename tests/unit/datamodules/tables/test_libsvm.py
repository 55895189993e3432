import bz2
import gzip

import numpy as np
import pytest
import torch
from sklearn.datasets import dump_svmlight_file, load_breast_cancer

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules import BreastCancerDataModule, LibSVMDataModule, MatrixFactorizationDataModule


def write(path, x: np.ndarray, y: np.ndarray) -> str:
    dump_svmlight_file(x, y, str(path), zero_based=False)
    return str(path)


def test_batches_hold_the_files_numbers(tmp_path) -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x[x < 0.1] = 0  # sparse rows of different lengths
    data = LibSVMDataModule(write(tmp_path / "cancer", x, 2 * y - 1), batch_size=100, val_size=69)
    data.setup("fit")
    order = torch.randperm(569, generator=torch.Generator().manual_seed(0))
    (*_, last) = data.val_dataloader()
    assert isinstance(last, SupervisedBatch)
    torch.testing.assert_close(last.x, torch.from_numpy(x[order[500:]]).float())
    assert last.y.tolist() == [[float(label)] for label in y[order[500:]]]
    batches = list(data.train_dataloader())
    assert [len(batch.y) for batch in batches] == [100] * 5
    np.testing.assert_allclose(sum(float(b.x.sum()) for b in batches), x[order[:500]].sum(), rtol=1e-5)


def test_compressed_files_second_files_and_tasks(tmp_path) -> None:
    x = np.eye(4)[:, :3]
    write(tmp_path / "train", x, np.array([2, 5, 9, 5]))
    with gzip.open(tmp_path / "train.gz", "wb") as file:
        file.write((tmp_path / "train").read_bytes())
    write(tmp_path / "test", x[1:3], np.array([9, 2]))
    files = (str(tmp_path / "train.gz"), str(tmp_path / "test"))
    data = LibSVMDataModule(*files, task="multiclass")
    data.setup("fit")
    assert data.train_data.y.tolist() == [
        int(i) for i in torch.tensor([0, 1, 2, 1])[torch.randperm(4, generator=torch.Generator().manual_seed(0))]
    ]
    (batch,) = data.test_dataloader()
    assert batch.y.tolist() == [2, 0]
    assert batch.x.tolist() == [[0, 1, 0], [0, 0, 1]]
    data = LibSVMDataModule(*files, task="regression", num_features=7)
    data.setup("fit")
    (batch,) = data.test_dataloader()
    assert batch.y.tolist() == [[9.0], [2.0]]
    assert batch.x.shape == (2, 7)
    write(tmp_path / "other", x[:2], np.array([2, 7]))
    data = LibSVMDataModule(files[0], str(tmp_path / "other"), task="multiclass")
    with pytest.raises(ValueError, match=r"other has labels that .*train.gz lacks: \[.*7"):
        data.setup("fit")


def test_says_what_is_missing_or_wrong(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks .*mushrooms\. Get a file.*csie.ntu.edu.tw"):
        LibSVMDataModule(str(tmp_path / "mushrooms")).setup("fit")
    (tmp_path / "text").write_text("this is no such file\n")
    with pytest.raises(ValueError, match=r"text is damaged or not in LIBSVM's format"):
        LibSVMDataModule(str(tmp_path / "text")).setup("fit")
    three = write(tmp_path / "three", np.eye(3), np.arange(3))
    with pytest.raises(ValueError, match=r"task='binary' needs two labels, .* has 3"):
        LibSVMDataModule(three).setup("fit")
    with pytest.raises(ValueError, match="more columns than num_features"):
        LibSVMDataModule(three, num_features=2, task="multiclass").setup("fit")
    with pytest.raises(ValueError, match=r"val_size=3 and test_size=0: .*three has 3 examples"):
        LibSVMDataModule(three, val_size=3, task="multiclass").setup("fit")


def test_breast_cancer_is_scaled_on_the_training_part() -> None:
    data = BreastCancerDataModule()
    data.setup("fit")
    assert [len(part.y) for part in (data.train_data, data.val_data, data.test_data)] == [396, 60, 113]
    torch.testing.assert_close(data.train_data.x.mean(0), torch.zeros(30), rtol=0, atol=1e-5)
    torch.testing.assert_close(data.train_data.x.std(0), torch.ones(30))
    assert data.train_data.y.unique().tolist() == [0, 1]


def test_matrix_factorization_is_linear_and_ill_conditioned() -> None:
    data = MatrixFactorizationDataModule(dtype="float64")
    data.setup("fit")
    x, y = data.train_data
    a = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(x @ a.T, y)
    rows = a.abs().amax(1)
    assert (rows / torch.linspace(1, 1e-10, 10, dtype=torch.float64)).max() < 1
    assert 1e-12 < rows[-1] < 1e-10


@pytest.mark.parametrize("line", ["1 1:nan", "1 1:0.5 2:inf", "nan 1:1"])
def test_numbers_must_be_finite(line, tmp_path):
    (tmp_path / "a").write_text(f"0 1:1\n1 2:1\n{line}\n0 1:2\n")
    with pytest.raises(ValueError, match=r"a: labels and values must be finite; they are not in example 3"):
        LibSVMDataModule(str(tmp_path / "a")).setup("fit")


def test_batches_that_fit_no_memory_are_refused(tmp_path):
    (tmp_path / "a").write_text("0 1:1\n1 2000000000:1\n")
    with pytest.raises(ValueError, match=r"has 2000000000 columns, .* would take 931 GiB, and must take <= 4 GiB"):
        LibSVMDataModule(str(tmp_path / "a")).setup("fit")


@pytest.mark.parametrize("ending", [".gz", ".bz2"])
def test_damaged_and_exploding_archives_are_named(ending, tmp_path, monkeypatch):
    path, pack = tmp_path / f"a{ending}", gzip.compress if ending == ".gz" else bz2.compress
    path.write_bytes(pack(b"0 1:1\n1 2:1\n" * 2000)[:-12])
    with pytest.raises(ValueError, match=rf"a\{ending} is damaged or not in LIBSVM's format"):
        LibSVMDataModule(str(path)).setup("fit")
    monkeypatch.setattr("lit_methods.datamodules.reading._ALWAYS", 10_000)
    path.write_bytes(pack(b"0 1:1\n" * 10**5))
    with pytest.raises(ValueError, match=rf"a\{ending} would unpack from"):
        LibSVMDataModule(str(path)).setup("fit")
