from pathlib import Path

import numpy as np
import pytest
import torch

from lit_methods.datamodules import ArrayFilesDataModule


def write(folder: Path, split: str, x: np.ndarray, y: np.ndarray) -> None:
    np.save(folder / f"{split}_x.npy", x)
    np.save(folder / f"{split}_y.npy", y)


def test_bytes_are_scaled_and_latents_are_not(tmp_path: Path) -> None:
    write(tmp_path, "train", np.array([[0], [255], [51]], np.uint8), np.array([0, 1, 2], np.int32))
    write(tmp_path, "test", np.full((2, 4), 7.0, np.float16), np.ones((2, 3, 5), np.float16))
    data = ArrayFilesDataModule(str(tmp_path), batch_size=3)
    data.setup("fit")
    x, y = next(iter(data.train_dataloader()))
    assert y.dtype == torch.int64
    torch.testing.assert_close(x[y.argsort()], torch.tensor([[-1.0], [1.0], [-0.6]]))
    assert data.val_dataloader() == []
    latents, words = next(iter(data.test_dataloader()))
    assert latents.dtype == words.dtype == torch.float32
    assert latents.tolist() == [[7.0] * 4] * 2
    assert words.shape == (2, 3, 5)


def test_what_is_missing_or_unequal_is_named(tmp_path: Path) -> None:
    data = ArrayFilesDataModule(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"lacks .*train_x\.npy and .*train_y\.npy"):
        data.setup("fit")
    write(tmp_path, "train", np.zeros((3, 1)), np.zeros(2))
    with pytest.raises(ValueError, match=r"train_x\.npy and train_y\.npy must hold equally many rows, got 3 and 2"):
        data.setup("fit")
