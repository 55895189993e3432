import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_methods.datamodules import FashionMNISTDataModule, MNISTDataModule
from lit_methods.datamodules.images.mnist import read_idx


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte.gz": rng.integers(0, 256, (20, 28, 28)),
        "train-labels-idx1-ubyte.gz": rng.integers(0, 10, 20),
        "t10k-images-idx3-ubyte.gz": rng.integers(0, 256, (6, 28, 28)),
        "t10k-labels-idx1-ubyte.gz": rng.integers(0, 10, 6),
    }


@pytest.fixture
def folder(tmp_path, arrays) -> Path:
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(gzip.compress(idx(array)))
    return tmp_path


def ready(folder, **arguments) -> MNISTDataModule:
    data = MNISTDataModule(str(folder), val_size=4, **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def test_batches_and_split(folder, arrays):
    data = ready(folder, batch_size=5)
    images, labels = arrays["t10k-images-idx3-ubyte.gz"], arrays["t10k-labels-idx1-ubyte.gz"]
    batch = next(iter(data.test_dataloader()))
    assert batch.x.shape == (5, 1, 28, 28)
    assert torch.equal(batch.x[:, 0], torch.tensor(images[:5] / 255, dtype=torch.float32))
    assert torch.equal(batch.y, torch.tensor(labels[:5]))
    pixels = torch.cat([data.train_data.x, data.val_data.x]).flatten(1)
    assert [len(data.train_data.y), len(data.val_data.y)] == [16, 4]
    assert sorted(pixels.tolist()) == sorted(arrays["train-images-idx3-ubyte.gz"].reshape(20, -1).tolist())
    other = ready(folder, seed=1)
    assert not torch.equal(data.val_data.x, other.val_data.x)


def damaged(content: bytes, how: str) -> bytes:
    if how == "not gzip":
        return b"<html>404</html>"
    if how == "gzip cut short":
        return gzip.compress(content)[:-30]
    if how == "gzip bits flipped":
        packed = bytearray(gzip.compress(content))
        packed[len(packed) // 2] ^= 0xFF
        return bytes(packed)
    changed = {
        "array cut short": content[:-1],
        "array too long": content + b"\0",
        "floats": content[:2] + b"\x0d" + content[3:],
        "no header": b"\0\0\x08",
        "header cut short": content[:9],
    }
    return gzip.compress(changed[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("not gzip", "damaged or not a gzip file"),
        ("gzip cut short", "damaged or not a gzip file"),
        ("gzip bits flipped", "damaged"),
        ("array cut short", r"damaged: 4719 bytes after unpacking, 4720 expected .* \(6, 28, 28\)"),
        ("array too long", "damaged: 4721 bytes"),
        ("floats", "not an IDX file of unsigned bytes: it starts with '00000d03'"),
        ("no header", "not an IDX file"),
        ("header cut short", "damaged"),
    ],
)
def test_damaged_files_are_named(folder, arrays, how, message):
    file = folder / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damaged(idx(arrays[file.name]), how))
    with pytest.raises(ValueError, match=message) as error:
        ready(folder)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-images-idx3-ubyte.gz", np.zeros((20, 28)), r"shape \(20, 28\); expected \(n >= 1, 28, 28\)"),
        ("train-images-idx3-ubyte.gz", np.zeros((20, 27, 28)), r"shape \(20, 27, 28\)"),
        ("train-images-idx3-ubyte.gz", np.zeros((0, 28, 28)), r"shape \(0, 28, 28\)"),
        ("train-labels-idx1-ubyte.gz", np.zeros(19), r"shape \(19,\); expected \(20,\)"),
        ("t10k-labels-idx1-ubyte.gz", np.full(6, 10), r"the label 10; expected 0\.\.9"),
    ],
)
def test_unexpected_contents_are_named(folder, name, array, message):
    (folder / name).write_bytes(gzip.compress(idx(array)))
    with pytest.raises(ValueError, match=message) as error:
        ready(folder)
    assert str(folder / name) in str(error.value)


def test_read_idx_of_any_rank(tmp_path):
    for array in (np.arange(6).reshape(1, 2, 3), np.arange(4), np.zeros((2, 0))):
        (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
        assert torch.equal(read_idx(tmp_path / "a.gz"), torch.tensor(array, dtype=torch.uint8))


class Elsewhere(FashionMNISTDataModule):
    """Fashion-MNIST whose mirror and system folder a test controls."""

    mirrors = ("http://127.0.0.1:9/",)  # nobody listens on the discard port
    system_dir = None


def test_missing_files_and_no_network(folder, monkeypatch):
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (folder / name).unlink()
    data = Elsewhere(str(folder), val_size=4)
    for step in (data.prepare_data, lambda: data.setup("fit")):
        with pytest.raises(FileNotFoundError) as error:
            step()
        message = str(error.value)
        assert str(folder) in message
        assert "http://127.0.0.1:9/t10k-images-idx3-ubyte.gz" in message
        assert "http://127.0.0.1:9/t10k-labels-idx1-ubyte.gz" in message
        assert "train-images" not in message
        assert "Debian package dataset-fashion-mnist" in message
        assert "data_dir=" in message


def test_system_folder_comes_second_and_nothing_is_fetched(folder, tmp_path, arrays, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    labels = np.full(6, 7)
    (own / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    monkeypatch.setattr(Elsewhere, "system_dir", folder)
    data = Elsewhere(str(own), val_size=4)
    data.prepare_data()
    data.setup("test")
    assert data.test_data.y.tolist() == [7] * 6
    assert len(data.train_data.y) == 16


def test_missing_files_are_downloaded(folder, tmp_path, arrays, monkeypatch):
    served = {file.name: file.read_bytes() for file in folder.glob("*.gz")}

    def fake_fetch(urls, path, md5):
        assert urls == [f"http://127.0.0.1:9/{path.name}"]
        assert md5 == Elsewhere.md5[path.name]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(served[path.name])

    monkeypatch.setattr("lit_methods.datamodules.images.mnist.fetch", fake_fetch)
    data = Elsewhere(str(tmp_path / "new"), val_size=4)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_data.y) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_size": -1}, "Invalid val_size=-1"),
        ({"batch_size": 0}, "Invalid batch_size=0"),
        ({"num_workers": -2}, "Invalid num_workers=-2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MNISTDataModule(**arguments)


def test_validation_larger_than_the_training_set(folder):
    data = MNISTDataModule(str(folder), val_size=20)
    with pytest.raises(ValueError, match=r"Invalid val_size=20: must be in \[0, 19\] for 20 images"):
        data.setup("fit")


@pytest.mark.skipif(
    not (FashionMNISTDataModule.system_dir / "t10k-labels-idx1-ubyte.gz").exists(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)
def test_real_fashion_mnist(tmp_path):
    data = FashionMNISTDataModule(str(tmp_path), batch_size=100)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_data.y) == 55000
    assert torch.equal(data.test_data.y.bincount(), torch.full((10,), 1000))
    labels = torch.cat([data.train_data.y, data.val_data.y])
    assert torch.equal(labels.bincount(), torch.full((10,), 6000))
    assert hashlib.md5(data.test_data.y.byte().numpy().tobytes()).hexdigest() == "8dea97a4e78c1bd1b5a6e8efbb870b6e"
    batch = next(iter(data.train_dataloader()))
    assert batch.x.shape == (100, 1, 28, 28)
    assert batch.x.max() == 1
    mean = data.test_data.x.double().mean() / 255
    assert abs(mean - 0.2868) < 5e-4  # the value that is published for normalisation
