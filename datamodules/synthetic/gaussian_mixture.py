"""Points from a mixture of spherical Gaussians of one's own."""

import math
from collections.abc import Sequence

import torch

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules.tensors import TensorDataModule, check_int


class GaussianMixtureDataModule(TensorDataModule):
    """Points of a mixture of spherical Gaussians in any dimension.

    Batches are :class:`~lit_methods.batches.SupervisedBatch`: ``x`` float32 ``(batch, dim)``, ``y`` int64 ``(batch,)``,
    the component. Nothing is fetched.

    Args:
        means: of the components, each of ``dim`` numbers.
        stds: standard deviations of the components, > 0.
        weights: of the components, > 0, scaled to sum 1; ``None``: equal.
        train_size: training points, >= 1.
        val_size: validation points, >= 0.
        test_size: test points, >= 0.
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: of the points and of their order, >= 0.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]],
        stds: Sequence[float],
        weights: Sequence[float] | None = None,
        train_size: int = 8192,
        val_size: int = 1024,
        test_size: int = 2048,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        weights = [1.0] * len(means) if weights is None else weights
        if not means or len({len(mean) for mean in means}) > 1 or not math.isfinite(sum(sum(m) for m in means)):
            raise ValueError(f"Invalid means={means!r}: must be one or more equally long lists of finite numbers.")
        for name, values in (("stds", stds), ("weights", weights)):
            if len(values) != len(means) or not all(0 < value < math.inf for value in values):
                raise ValueError(f"Invalid {name}={values!r}: must be as many numbers > 0 as there are means.")
        self.means, self.stds, self.weights = means, stds, weights
        self.sizes = [
            check_int("train_size", train_size, 1),
            check_int("val_size", val_size, 0),
            check_int("test_size", test_size, 0),
        ]

    def setup(self, stage: str) -> None:
        """Draw the points."""
        generator = torch.Generator().manual_seed(self.seed)
        y = torch.multinomial(torch.tensor(self.weights), sum(self.sizes), replacement=True, generator=generator)
        means, stds = torch.tensor(self.means), torch.tensor(self.stds)
        noise = torch.randn(len(y), means.shape[1], generator=generator)
        x = means[y] + stds[y, None] * noise
        splits = zip(x.split(self.sizes), y.split(self.sizes), strict=True)
        self.train_data, self.val_data, self.test_data = (SupervisedBatch(*rows) for rows in splits)
