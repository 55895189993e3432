"""What every optimizer promises on CUDA. Skipped without a GPU."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.contract.cases import OPTIMIZERS, OptimizerCase
from tests.contract.optimizer_checks import STEPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS),
]


def train(case: OptimizerCase, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(device, dtype)
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.arange(16) % 3
    x, y = x.to(device, dtype), y.to(device)
    optimizer = case.make(model.parameters(), model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    with no_syncs() if device == "cuda" and not case.host_syncs else contextlib.nullcontext():
        for _ in range(STEPS):
            optimizer.step(closure)
    return model


@contextlib.contextmanager
def no_syncs() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_agrees_with_the_cpu_without_undeclared_host_synchronisation(case: OptimizerCase) -> None:
    on_gpu, on_cpu = train(case, "cuda", torch.float64), train(case, "cpu", torch.float64)
    if case.draws_noise:  # other random numbers: the runs cannot agree
        assert all(p.isfinite().all() for p in on_gpu.parameters())
        return
    for p, q in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-8, atol=1e-10)


def test_bfloat16_stays_finite(case: OptimizerCase) -> None:
    assert all(p.isfinite().all() for p in train(case, "cuda", torch.bfloat16).parameters())
