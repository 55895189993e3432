"""A linear teacher that looks at few of many inputs."""

import torch

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules.tensors import TensorDataModule, check_int


class SparseTeacherDataModule(TensorDataModule):
    """Regression on positive inputs of which few matter, all with positive weights; what multiplicative steps are for.

    Inputs are uniform in [0, 2]. The target is ``<w, x>`` plus noise, where ``num_relevant`` weights, at random places,
    are uniform in [0.5, 1.5] and then scaled so that the target without noise has variance 1: a mean squared error of 1
    is that of the mean. Batches are :class:`~lit_methods.batches.SupervisedBatch`: ``x`` float32
    ``(batch, num_inputs)``, ``y`` float32 ``(batch, 1)``.

    Args:
        num_inputs: >= 1.
        num_relevant: inputs that matter, in [1, num_inputs].
        train_size: training rows, >= 1; with fewer than inputs the problem is under-determined.
        val_size: validation rows, >= 0.
        test_size: test rows, >= 0.
        noise_std: standard deviation of the targets' noise, >= 0.
        batch_size: samples per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        seed: of teacher, rows and order, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_inputs: int = 1000,
        num_relevant: int = 5,
        train_size: int = 200,
        val_size: int = 1000,
        test_size: int = 1000,
        noise_std: float = 0.0,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.num_inputs = check_int("num_inputs", num_inputs, 1)
        self.num_relevant = check_int("num_relevant", num_relevant, 1, num_inputs)
        self.sizes = [
            check_int("train_size", train_size, 1),
            check_int("val_size", val_size, 0),
            check_int("test_size", test_size, 0),
        ]
        if not 0 <= noise_std < float("inf"):
            raise ValueError(f"Invalid noise_std={noise_std!r}: must be >= 0 and finite.")
        self.noise_std = noise_std

    def setup(self, stage: str) -> None:
        """Draw the teacher, then the rows."""
        generator = torch.Generator().manual_seed(self.seed)
        relevant = torch.randperm(self.num_inputs, generator=generator)[: self.num_relevant]
        self.teacher = torch.zeros(self.num_inputs)
        self.teacher[relevant] = torch.rand(self.num_relevant, generator=generator) + 0.5
        self.teacher *= 3**0.5 / self.teacher.norm()  # an input has variance 1/3
        x = 2 * torch.rand(sum(self.sizes), self.num_inputs, generator=generator)
        noise = self.noise_std * torch.randn(len(x), generator=generator)
        y = (x @ self.teacher + noise)[:, None]
        rows = (SupervisedBatch(*part) for part in zip(x.split(self.sizes), y.split(self.sizes), strict=True))
        self.train_data, self.val_data, self.test_data = rows
