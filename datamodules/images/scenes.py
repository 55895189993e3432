"""Scenes of several handwritten digits, put together from real ones."""

import torch
from torch import Tensor
from torch.nn import functional

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules.images.digits import DigitsDataModule
from lit_methods.datamodules.images.mnist import MNISTDataModule
from lit_methods.datamodules.tensors import TensorDataModule, check_int


class DigitScenesDataModule(TensorDataModule):
    """Scenes of 0 to ``max_digits`` of the 8x8 digits that scikit-learn ships, at random places, without overlap.

    The digits are real, the scenes are generated from ``seed``; training, validation and test scenes are made of
    different digits. Batches are :class:`~lit_methods.batches.SupervisedBatch`: ``x`` float32
    ``(batch, 1, size, size)`` in [0, 1], ``y`` int64 ``(batch,)``, the number of digits. Nothing is fetched.

    Args:
        size: pixels of a side, >= 8 * ``max_digits``.
        max_digits: largest number of digits, >= 1; all numbers from 0 are equally frequent.
        train_size: training scenes, >= 1.
        val_size: validation scenes, >= 0.
        test_size: test scenes, >= 0.
        batch_size: scenes per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: of the scenes and of their order, >= 0.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        size: int = 20,
        max_digits: int = 2,
        train_size: int = 4096,
        val_size: int = 512,
        test_size: int = 1024,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.max_digits = check_int("max_digits", max_digits, 1)
        self.size = check_int("size", size, 8 * max_digits)
        self.sizes = [
            check_int("train_size", train_size, 1),
            check_int("val_size", val_size, 0),
            check_int("test_size", test_size, 0),
        ]

    def setup(self, stage: str) -> None:
        """Split the digits, and make the scenes."""
        digits = DigitsDataModule(seed=self.seed)
        digits.setup(stage)
        generator = torch.Generator().manual_seed(self.seed)
        parts = []
        for data, count in zip((digits.train_data, digits.val_data, digits.test_data), self.sizes, strict=True):
            assert data is not None
            parts.append(_scenes(data[0][:, 0], count, self.max_digits, self.size, generator))
        self.train_data, self.val_data, self.test_data = parts


class MultiMNISTDataModule(TensorDataModule):
    """Scenes of 0 to ``max_digits`` MNIST digits of random sizes on a dark square, without overlap (multi-MNIST).

    As Pyro's ``multi_mnist``, from which the paper's experiments take it: a digit is scaled by 1 / s,
    ``s ~ N(1.3, 0.1)``. The digits are real, the scenes are generated from ``seed``; those of the test are made of
    official test digits. Batches are :class:`~lit_methods.batches.SupervisedBatch`: ``x`` float32
    ``(batch, 1, size, size)`` in [0, 1], ``y`` int64 ``(batch,)``, the number of digits. Files as for
    :class:`MNISTDataModule`.

    Args:
        data_dir: folder with MNIST's four files.
        size: pixels of a side, >= 50 for three digits.
        max_digits: largest number of digits, >= 1.
        train_size: training scenes, >= 1.
        val_size: validation scenes, >= 0.
        test_size: test scenes, >= 0.
        batch_size: scenes per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: of the scenes and of their order, >= 0.

    Raises:
        ValueError: for an argument out of range, or a damaged file.
        FileNotFoundError: when files are missing and cannot be downloaded; says which, where, and how to get them.
    """

    def __init__(
        self,
        data_dir: str = "data/mnist",
        size: int = 50,
        max_digits: int = 3,
        train_size: int = 60000,
        val_size: int = 1000,
        test_size: int = 10000,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.digits = MNISTDataModule(data_dir=data_dir, seed=seed, val_size=1)
        self.max_digits = check_int("max_digits", max_digits, 1)
        self.size = check_int("size", size, 28 + 11 * (max_digits - 1))
        self.sizes = [
            check_int("train_size", train_size, 1),
            check_int("val_size", val_size, 0),
            check_int("test_size", test_size, 0),
        ]

    def prepare_data(self) -> None:
        """Download MNIST's missing files."""
        self.digits.prepare_data()

    def setup(self, stage: str) -> None:
        """Read MNIST, and make the scenes."""
        self.digits.setup(stage)
        train, test = self.digits.train_data, self.digits.test_data
        assert train is not None
        assert test is not None
        generator = torch.Generator().manual_seed(self.seed)
        parts = []
        for data, count in zip((train, train, test), self.sizes, strict=True):
            images = data[0][:, 0].float() / 255
            parts.append(_scenes(images, count, self.max_digits, self.size, generator, zoom=(1.3, 0.1)))
        self.train_data, self.val_data, self.test_data = parts


def _scenes(
    digits: Tensor,
    count: int,
    max_digits: int,
    size: int,
    generator: torch.Generator,
    zoom: tuple[float, float] | None = None,
) -> SupervisedBatch:
    """Scenes of digits ``(n, height, width)``; a scene whose digits overlap is drawn again."""
    scenes = torch.zeros(count, 1, size, size)
    numbers = torch.randint(max_digits + 1, (count,), generator=generator)
    for i in range(count):
        while True:
            scene = torch.zeros(size, size)
            for _ in range(int(numbers[i])):
                digit = digits[int(torch.randint(len(digits), (), generator=generator))]
                if zoom is not None:
                    scale = max(zoom[0] + zoom[1] * float(torch.randn((), generator=generator)), 0.8)
                    new = [int(side / scale) for side in digit.shape]
                    digit = functional.interpolate(digit[None, None], new, mode="bilinear", antialias=True)[0, 0]
                height, width = digit.shape
                top = int(torch.randint(size - height + 1, (), generator=generator))
                left = int(torch.randint(size - width + 1, (), generator=generator))
                scene[top : top + height, left : left + width] += digit
            if scene.max() <= 1:  # else two digits overlap
                break
        scenes[i, 0] = scene
    return SupervisedBatch(scenes, numbers)
