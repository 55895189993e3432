"""An ill-conditioned linear map to be learned by two linear layers."""

from typing import Literal

import torch

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules.tensors import TensorDataModule, check_int


class MatrixFactorizationDataModule(TensorDataModule):
    """Pairs ``y = A x`` for a map ``A`` of condition number about 1e10, the synthetic problem of arXiv 2302.02607.

    ``A = diag(linspace(1, 1e-10, out_features)) B``, ``B`` uniform in [0, 1), ``x`` standard normal. Batches are
    :class:`~lit_methods.batches.SupervisedBatch`: ``x`` ``(batch, in_features)``, ``y`` ``(batch, out_features)``.
    Validation and test data are the training data: the question is how fast the loss goes to zero.

    Args:
        num_samples: number of pairs, >= 1.
        in_features: size of ``x``, >= 1.
        out_features: size of ``y``, >= 1.
        batch_size: pairs per batch on each rank, >= 1; ``num_samples`` for full batches.
        num_workers: loader processes on each rank, >= 0.
        dtype: floating point type of the batches.
        seed: seed of the map, the pairs and the sample order, >= 0.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        num_samples: int = 1000,
        in_features: int = 6,
        out_features: int = 10,
        batch_size: int = 1000,
        num_workers: int = 0,
        dtype: Literal["float32", "float64"] = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.num_samples = check_int("num_samples", num_samples, 1)
        self.in_features = check_int("in_features", in_features, 1)
        self.out_features = check_int("out_features", out_features, 1)
        if dtype not in ("float32", "float64"):
            raise ValueError(f"Invalid dtype={dtype!r}: must be 'float32' or 'float64'.")
        self.dtype: torch.dtype = getattr(torch, dtype)

    def setup(self, stage: str) -> None:
        """Draw the map and the pairs."""
        generator = torch.Generator().manual_seed(self.seed)
        scales = torch.linspace(1, 1e-10, self.out_features, dtype=torch.float64)[:, None]
        a = scales * torch.rand(self.out_features, self.in_features, generator=generator, dtype=torch.float64)
        x = torch.randn(self.num_samples, self.in_features, generator=generator, dtype=torch.float64)
        self.train_data = SupervisedBatch(x.to(self.dtype), (x @ a.T).to(self.dtype))
        self.val_data = self.test_data = self.train_data
