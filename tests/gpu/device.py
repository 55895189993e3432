"""The device of the GPU tests and measurements: CUDA, or the CPU in a dry run, which shows only that they run."""

import os

import pytest
import torch

DRY_RUN = "LIT_METHODS_GPU_DRY_RUN" in os.environ
DEVICE = "cpu" if DRY_RUN else "cuda"
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (DRY_RUN or torch.cuda.is_available()), reason="needs CUDA"),
]
