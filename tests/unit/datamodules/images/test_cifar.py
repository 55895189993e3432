import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lit_methods.batches import SupervisedBatch
from lit_methods.callbacks import ExactResume
from lit_methods.datamodules import CIFAR10DataModule, CIFAR100DataModule
from lit_methods.datamodules.images.cifar import random_crop_and_flip
from tests.standins.cifar_files import random_contents, write_archive, write_cifar


class Elsewhere(CIFAR10DataModule):
    """CIFAR-10 without a network."""

    mirrors = ("http://127.0.0.1:9/",)  # nobody listens on the discard port


def ready(folder, kind=Elsewhere, **arguments) -> CIFAR10DataModule:
    data = kind(str(folder), **({"val_size": 8, "batch_size": 4} | arguments))
    data.prepare_data()
    data.setup("fit")
    return data


def decode(content: bytes, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The published description of a record, byte by byte: labels, then the red, green and blue plane by rows."""
    size = label_bytes + 3072
    labels, images = [], []
    for start in range(0, len(content), size):
        labels.append(list(content[start : start + label_bytes]))
        image = np.empty((3, 32, 32))
        for channel in range(3):
            for row in range(32):
                at = start + label_bytes + 1024 * channel + 32 * row
                image[channel, row] = list(content[at : at + 32])
        images.append(image)
    return np.array(labels), np.array(images)


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def normalized(images: np.ndarray, mean=MEAN, std=STD) -> torch.Tensor:
    planes = [(images[:, c] / 255 - mean[c]) / std[c] for c in range(3)]
    return torch.tensor(np.stack(planes, 1), dtype=torch.float32)


def test_batches_and_split(tmp_path):
    write_cifar(tmp_path, CIFAR10DataModule)
    contents = random_contents(CIFAR10DataModule)
    data = ready(tmp_path)
    labels, images = decode(contents["test_batch.bin"], 1)
    batches = list(data.test_dataloader())
    assert isinstance(batches[0], SupervisedBatch)
    torch.testing.assert_close(torch.cat([b.x for b in batches]), normalized(images))
    assert torch.cat([b.y for b in batches]).tolist() == labels[:, 0].tolist()
    assert [len(data.train_data.y), len(data.val_data.y)] == [32, 8]
    stored = torch.cat([data.train_data.x, data.val_data.x]).flatten(1).tolist()
    files = [decode(contents[f"data_batch_{i}.bin"], 1)[1].reshape(8, -1).tolist() for i in range(1, 6)]
    assert sorted(stored) == sorted(row for file in files for row in file)
    assert not torch.equal(data.val_data.x, ready(tmp_path, seed=1).val_data.x)


def test_given_normalisation(tmp_path):
    write_cifar(tmp_path, CIFAR10DataModule)
    data = ready(tmp_path, mean=(0.0, 0.5, 1.0), std=(1.0, 2.0, 0.5))
    _, images = decode(random_contents(CIFAR10DataModule)["test_batch.bin"], 1)
    x = next(iter(data.test_dataloader())).x
    torch.testing.assert_close(x, normalized(images[:4], (0.0, 0.5, 1.0), (1.0, 2.0, 0.5)))


@pytest.mark.parametrize(("label", "byte", "classes"), [("fine", 1, 100), ("coarse", 0, 20)])
def test_cifar100_labels(tmp_path, label, byte, classes):
    write_cifar(tmp_path, CIFAR100DataModule)
    data = ready(tmp_path, CIFAR100DataModule, label=label)
    labels, images = decode(random_contents(CIFAR100DataModule)["test.bin"], 2)
    assert data.num_classes == classes
    assert data.test_data.y.tolist() == labels[:, byte].tolist()
    assert data.test_data.x.tolist() == images.tolist()


@pytest.mark.parametrize("inside", [True, False])
def test_unpacked_folder_will_do(tmp_path, inside):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, content in random_contents(CIFAR10DataModule).items():
        (folder / name).write_bytes(content)
    data = ready(folder if inside else tmp_path)
    assert len(data.train_data.y) == 32


def test_missing_files_and_no_network(tmp_path):
    data = Elsewhere(str(tmp_path))
    for step in (data.prepare_data, lambda: data.setup("fit")):
        with pytest.raises(FileNotFoundError) as error:
            step()
        message = str(error.value)
        for part in (
            str(tmp_path),
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            "data_batch_3.bin",
            "http://127.0.0.1:9/cifar-10-binary.tar.gz",
            "data_dir=",
        ):
            assert part in message, part


def test_missing_archive_is_downloaded(tmp_path, monkeypatch):
    def fake_fetch(urls, path, md5):
        assert urls == ["http://127.0.0.1:9/cifar-10-binary.tar.gz"]
        assert md5 == "c32a1d4ab5d03f1284b67883e8d87530"
        path.parent.mkdir()
        write_cifar(path.parent, CIFAR10DataModule)

    monkeypatch.setattr("lit_methods.datamodules.images.cifar.fetch", fake_fetch)
    assert len(ready(tmp_path / "new").train_data.y) == 32


def damaged(folder: Path, how: str) -> None:
    contents = random_contents(CIFAR10DataModule)
    path = folder / "cifar-10-binary.tar.gz"
    if how == "label":
        contents["data_batch_2.bin"] = b"\x0a" + contents["data_batch_2.bin"][1:]
    if how == "record cut short":
        contents["data_batch_2.bin"] = contents["data_batch_2.bin"][:-1]
    if how == "empty":
        contents["data_batch_2.bin"] = b""
    if how == "file missing":
        del contents["data_batch_2.bin"]
    write_archive(path, "other" if how == "other folder" else "cifar-10-batches-bin", contents)
    whole = path.read_bytes()
    if how == "not gzip":
        path.write_bytes(b"<html>404</html>")
    if how == "gzip of something else":
        path.write_bytes(gzip.compress(b"hello" * 500))
    if how == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
    if how == "bits flipped":
        path.write_bytes(whole[:9000] + bytes([whole[9000] ^ 0xFF]) + whole[9001:])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("not gzip", "damaged or not a gzipped tar file"),
        ("gzip of something else", "damaged or not a gzipped tar file"),
        ("cut short", "damaged or not a gzipped tar file"),
        ("bits flipped", "damaged or not a gzipped tar file"),
        ("other folder", "does not hold data_batch_1.bin, .*is it the binary version"),
        ("file missing", "does not hold data_batch_2.bin in cifar-10-batches-bin"),
        ("record cut short", "data_batch_2.bin is damaged: 24583 bytes, not a multiple .* of 3073"),
        ("empty", "data_batch_2.bin is damaged: 0 bytes"),
        ("label", r"data_batch_2.bin holds the label 10; expected 0\.\.9"),
    ],
)
def test_damaged_files_are_named(tmp_path, how, message):
    damaged(tmp_path, how)
    with pytest.raises(ValueError, match=message) as error:
        ready(tmp_path)
    assert str(tmp_path / "cifar-10-binary.tar.gz") in str(error.value)


def test_members_that_are_no_files_are_not_followed(tmp_path):
    """A member that points elsewhere counts as missing, and nothing is written next to the archive."""
    (tmp_path / "secret").write_bytes(bytes(3073))
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name in random_contents(CIFAR10DataModule):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
            tar.addfile(member)
    with pytest.raises(ValueError, match=r"does not hold data_batch_1\.bin"):
        ready(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-binary.tar.gz", "secret"]


def test_validation_larger_than_the_training_set(tmp_path):
    write_cifar(tmp_path, CIFAR10DataModule)
    with pytest.raises(ValueError, match=r"Invalid val_size=40: must be in \[0, 39\] for 40 images"):
        ready(tmp_path, val_size=40)


def one_by_one(x: torch.Tensor, fill: torch.Tensor, padding: int) -> torch.Tensor:
    """The same draws, applied image by image and pixel by pixel."""
    n, channels, height, width = x.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, n)).tolist()
    flip = (torch.rand(n) < 0.5).tolist()
    out = torch.empty_like(x)
    for i in range(n):
        for c in range(channels):
            for row in range(height):
                for column in range(width):
                    source_row = row + top[i] - padding
                    source_column = (width - 1 - column if flip[i] else column) + left[i] - padding
                    inside = 0 <= source_row < height and 0 <= source_column < width
                    out[i, c, row, column] = x[i, c, source_row, source_column] if inside else fill[c, 0, 0]
    return out


@pytest.mark.parametrize(("shape", "padding"), [((6, 3, 8, 8), 4), ((5, 1, 7, 4), 2), ((1, 2, 3, 3), 0)])
def test_augmentation_equals_a_loop_over_samples(shape, padding):
    x, fill = torch.randn(shape), torch.randn(shape[1], 1, 1)
    before = x.clone()
    for seed in range(5):
        torch.manual_seed(seed)
        fast = random_crop_and_flip(x, fill, padding)
        after = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(fast, one_by_one(x, fill, padding))
        assert torch.equal(after, torch.rand(3)), "both draw the same numbers"
    assert torch.equal(x, before)


def test_augmentation_reaches_every_place_of_every_sample():
    """The position of a single bright pixel tells shift and flip; all 81 x 2 must come up about equally often."""
    x = torch.zeros(8000, 1, 9, 9)
    x[..., 4, 3] = 1
    x[..., 4, 4] = 2  # right of the first, unless flipped
    torch.manual_seed(0)
    y = random_crop_and_flip(x, torch.zeros(1, 1, 1), 4)
    centre = (y[:, 0] == 2).flatten(1)
    assert centre.any(1).all()
    place = centre.int().argmax(1)
    counts = place.bincount(minlength=81).double()
    expected = 8000 / 81
    assert ((counts - expected) ** 2 / expected).sum() < 130  # chi-squared with 80 degrees: p = 0.0003
    neighbour = (y[:, 0] == 1).flatten(1)
    seen = neighbour.any(1)
    flipped = neighbour[seen].int().argmax(1) > place[seen]
    assert abs(flipped.double().mean() - 0.5) < 0.025


def test_augmentation_makes_no_calls_per_sample():
    def calls(n: int) -> int:
        x = torch.randn(n, 3, 32, 32)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            random_crop_and_flip(x, torch.zeros(3, 1, 1))
        return sum(event.count for event in recorded.key_averages())

    calls(2)
    assert calls(64) == calls(2)


class Watcher(LightningModule):
    """Keeps the batches that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[SupervisedBatch]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def quiet_trainer(**arguments) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "use_distributed_sampler": False, "max_epochs": 1}
    return Trainer(**quiet | arguments)


@pytest.mark.parametrize("augment", [True, False])
def test_only_training_batches_are_augmented(tmp_path, augment):
    write_cifar(tmp_path, CIFAR10DataModule)
    watcher, data, trainer = Watcher(), Elsewhere(str(tmp_path), 4, val_size=8, augment=augment), quiet_trainer()
    trainer.fit(watcher, data)
    trainer.test(watcher, data, verbose=False)
    trainer.predict(watcher, data)
    plain = ready(tmp_path)
    for stage, loader in (("test", plain.test_dataloader()), ("predict", plain.test_dataloader())):
        for seen, expected in zip(watcher.seen[stage], loader, strict=True):
            assert torch.equal(seen.x, expected.x)
    for seen, expected in zip(watcher.seen["val"][-2:], plain.val_dataloader(), strict=True):
        assert torch.equal(seen.x, expected.x)
    same = []
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).view(3, 1, 1)
    for seen, expected in zip(watcher.seen["train"], plain.train_dataloader(), strict=True):
        assert torch.equal(seen.y, expected.y)
        same += [torch.equal(a, b) for a, b in zip(seen.x, expected.x, strict=True)]
        if augment:
            corners = seen.x[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
            assert ((corners - black[..., 0]).abs() < 1e-6).all(1).any(), "borders are padded with black"
    assert all(same) != augment


def test_a_resumed_run_sees_the_same_augmented_batches(tmp_path):
    write_cifar(tmp_path, CIFAR10DataModule)
    torch.manual_seed(5)
    whole = Watcher()
    quiet_trainer(max_epochs=2, callbacks=ExactResume()).fit(whole, Elsewhere(str(tmp_path), 4, val_size=8))
    torch.manual_seed(5)
    first = quiet_trainer(max_steps=11, max_epochs=None, callbacks=ExactResume())
    first.fit(Watcher(), Elsewhere(str(tmp_path), 4, val_size=8))
    first.save_checkpoint(tmp_path / "at_11.ckpt")
    torch.manual_seed(6)
    rest = Watcher()
    resumed = quiet_trainer(max_epochs=2, callbacks=ExactResume())
    resumed.fit(rest, Elsewhere(str(tmp_path), 4, val_size=8), ckpt_path=tmp_path / "at_11.ckpt")
    assert [len(whole.seen["train"]), len(rest.seen["train"])] == [16, 5]
    for expected, seen in zip(whole.seen["train"][11:], rest.seen["train"], strict=True):
        assert torch.equal(seen.x, expected.x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_augmentation_on_cuda_waits_for_nothing():
    x, fill = torch.randn(64, 3, 32, 32, device="cuda"), torch.zeros(3, 1, 1, device="cuda")
    random_crop_and_flip(x, fill)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = random_crop_and_flip(x, fill)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert y.device == x.device
    values = torch.cat([x.flatten(), fill.flatten()[:1]])
    assert torch.isin(y, values).all()
