"""Real handwritten digits as point sets, and the same digits moved by one rigid motion."""

import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lit_methods.batches import PointSetBatch
from lit_methods.datamodules.tensors import TensorDataModule, check_int

_NUM_SAMPLES = 1797


class DigitPointsDataModule(TensorDataModule):
    """Pairs of point sets sampled from scikit-learn's 8x8 digits; the targets are turned and shifted.

    Batches are :class:`~lit_methods.batches.PointSetBatch`, float32 ``(batch, num_points, 2)``. Points of an image are
    drawn with probability proportional to its pixels' ink, uniformly within the pixel; the image fills [-1, 1]^2.
    Source and target are independent draws, so no point has a partner. Targets are turned by ``angle`` about the
    origin, then shifted. Split and points are a function of ``seed``.

    Args:
        num_points: points of each set, >= 1.
        angle: in degrees, counterclockwise.
        shift: of the two coordinates.
        batch_size: pairs per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: seed of the split, the points and the sample order, >= 0.
        val_size: number of validation pairs, >= 0.
        test_size: number of test pairs, >= 0; at least one must be left for training.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_points: int = 64,
        angle: float = 30.0,
        shift: tuple[float, float] = (0.5, -0.3),
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        val_size: int = 180,
        test_size: int = 360,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.num_points = check_int("num_points", num_points, 1)
        if not math.isfinite(angle):
            raise ValueError(f"Invalid angle={angle}: must be finite.")
        if len(shift) != 2 or not all(map(math.isfinite, shift)):
            raise ValueError(f"Invalid shift={shift}: must be two finite numbers.")
        self.angle = angle
        self.shift = tuple(shift)
        self.val_size = check_int("val_size", val_size, 0, _NUM_SAMPLES - 1)
        self.test_size = check_int("test_size", test_size, 0, _NUM_SAMPLES - 1 - val_size)

    def setup(self, stage: str) -> None:
        """Read the digits, split them and draw the points."""
        generator = torch.Generator().manual_seed(self.seed)
        ink = torch.from_numpy(load_digits().images).float().flatten(1)
        ink = ink[torch.randperm(_NUM_SAMPLES, generator=generator)]
        source, target = (self._draw(ink, generator) for _ in range(2))
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        target = target @ torch.tensor([[cos, sin], [-sin, cos]]) + torch.tensor(self.shift)
        sizes = [_NUM_SAMPLES - self.val_size - self.test_size, self.val_size, self.test_size]
        parts = zip(source.split(sizes), target.split(sizes), strict=True)
        self.train_data, self.val_data, self.test_data = (PointSetBatch(*part) for part in parts)

    def _draw(self, ink: Tensor, generator: torch.Generator) -> Tensor:
        pixel = torch.multinomial(ink, self.num_points, replacement=True, generator=generator)
        corner = torch.stack([pixel % 8, 7 - pixel // 8], -1)  # right and up
        return (corner + torch.rand(corner.shape, generator=generator)) / 4 - 1
