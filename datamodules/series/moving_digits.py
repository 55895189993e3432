"""Videos of handwritten digits that bounce in random directions."""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from lit_methods.batches import PathBatch
from lit_methods.datamodules.images import MNISTDataModule
from lit_methods.datamodules.tensors import TensorDataModule, check_int


class _Tracks(NamedTuple):
    """Which digits, ``(rows, n)``, and their upper left corners in all frames, ``(rows, n, T, 2)``."""

    digits: Tensor
    corners: Tensor


class MovingDigitsDataModule(TensorDataModule):
    """Stochastic moving digits (Denton and Fergus, 2018): digits that fly straight and bounce in random directions.

    A digit moves by whole pixels, up to ``max_speed`` a frame in both directions; at a wall both speeds are drawn anew,
    away from that wall. Batches are :class:`~lit_methods.batches.PathBatch`: times ``dt * (0 .. num_frames - 1)`` and
    values float32 ``(batch, num_frames, 1, size, size)`` in [0, 1], all seen. Only tracks are kept; frames are drawn
    when a batch is fetched. The 8x8 digits of scikit-learn, enlarged, need no download; with ``data_dir`` they are
    MNIST's, enlarged from 28 pixels, as in the paper. Test digits are not seen in training.

    Args:
        data_dir: folder with MNIST's four files, fetched if missing; ``None``: scikit-learn's digits.
        size: height and width of a frame, >= digit_size.
        digit_size: height and width of a digit, >= 8.
        num_digits: per video, >= 1.
        num_frames: >= 2.
        max_speed: pixels per frame, >= 1.
        dt: time between frames, > 0.
        train_size: training videos, >= 1.
        val_size: validation videos, >= 0; with training digits.
        test_size: test videos, >= 0.
        batch_size: videos per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: of digits, tracks and order, >= 0.

    Raises:
        ValueError: an argument out of range.
        FileNotFoundError: MNIST's files are missing and cannot be downloaded.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        size: int = 32,
        digit_size: int = 16,
        num_digits: int = 2,
        num_frames: int = 25,
        max_speed: int = 4,
        dt: float = 0.1,
        train_size: int = 2000,
        val_size: int = 200,
        test_size: int = 400,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, transform=self._draw)
        self.size = check_int("size", size, 8)
        self.digit_size = check_int("digit_size", digit_size, 8, size)
        self.num_digits = check_int("num_digits", num_digits, 1)
        self.num_frames = check_int("num_frames", num_frames, 2)
        self.max_speed = check_int("max_speed", max_speed, 1)
        if not 0 < dt < float("inf"):
            raise ValueError(f"Invalid dt={dt!r}: must be > 0 and finite.")
        self.dt = dt
        self.sizes = [
            check_int("train_size", train_size, 1),
            check_int("val_size", val_size, 0),
            check_int("test_size", test_size, 0),
        ]
        self.mnist = None if data_dir is None else MNISTDataModule(data_dir, val_size=0)

    def prepare_data(self) -> None:
        """Download MNIST, if it is asked for and missing."""
        if self.mnist is not None:
            self.mnist.prepare_data()

    def setup(self, stage: str) -> None:
        """Read the digits and draw the tracks."""
        train, test = self._read()
        # One sprite for each digit, in one table; test digits stand at its end.
        self.sprites = torch.cat([train, test])
        generator = torch.Generator().manual_seed(self.seed)
        found = []
        for number, low, high in zip(
            self.sizes, (0, 0, len(train)), (len(train), len(train), len(self.sprites)), strict=True
        ):
            digits = torch.randint(low, high, (number, self.num_digits), generator=generator)
            found.append(_Tracks(digits, self._fly(number, generator)))
        self.train_data, self.val_data, self.test_data = found

    def _read(self) -> tuple[Tensor, Tensor]:
        if self.mnist is None:
            images = torch.from_numpy(load_digits().images).float().div_(16)[:, None]
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
            parts = images[order[360:]], images[order[:360]]
        else:
            self.mnist.setup("fit")
            assert self.mnist.train_data is not None
            assert self.mnist.test_data is not None
            parts = self.mnist.train_data[0].float().div(255), self.mnist.test_data[0].float().div(255)
        enlarged = [functional.interpolate(x, (self.digit_size,) * 2, mode="bilinear")[:, 0] for x in parts]
        return enlarged[0], enlarged[1]

    def _fly(self, number: int, generator: torch.Generator) -> Tensor:
        room = self.size - self.digit_size
        shape = (number, self.num_digits, 2)
        place = torch.randint(0, room + 1, shape, generator=generator)
        speed = torch.randint(-self.max_speed, self.max_speed + 1, shape, generator=generator)
        track = []
        for _ in range(self.num_frames):
            track.append(place.to(torch.int16))
            place = place + speed
            low, high = place < 0, place > room
            away = torch.randint(1, self.max_speed + 1, shape, generator=generator)
            anew = torch.randint(-self.max_speed, self.max_speed + 1, shape, generator=generator)
            hit = (low | high).any(-1, keepdim=True)
            speed = torch.where(low, away, torch.where(high, -away, torch.where(hit, anew, speed)))
            place = place.clamp(0, room)
        return torch.stack(track, 2)

    def _draw(self, tracks: _Tracks) -> PathBatch:
        rows, _, frames, _ = tracks.corners.shape
        canvas = torch.zeros(rows, frames, self.size, self.size)
        pixels = torch.arange(self.digit_size)
        row, frame = torch.arange(rows)[:, None, None, None], torch.arange(frames)[:, None, None]
        for digits, corners in zip(tracks.digits.T, tracks.corners.long().unbind(1), strict=True):
            vertical = corners[..., 0, None, None] + pixels[:, None]
            horizontal = corners[..., 1, None, None] + pixels
            canvas[row, frame, vertical, horizontal] += self.sprites[digits][:, None]
        times = self.dt * torch.arange(frames)
        return PathBatch(times, canvas.clamp(max=1)[:, :, None], torch.ones(rows, frames, dtype=torch.bool))
