"""What every optimizer promises on CUDA. Skipped without a GPU."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tests.contract.cases import OPTIMIZERS, OptimizerCase
from tests.contract.compare import assert_same
from tests.contract.optimizer_checks import STEPS
from tests.gpu.device import DEVICE, ON_GPU

pytestmark = [
    *ON_GPU,
    pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=[k.rpartition(".")[2] for k in OPTIMIZERS]),
]


def problem(device: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A small network with the same weights and data on every device, and its loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.arange(16) % 3
    x, y = x.to(device, dtype), y.to(device)
    return model.to(device, dtype), lambda network: nn.functional.cross_entropy(network(x), y)


def train(optimizer: Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(closure)


@contextlib.contextmanager
def no_syncs() -> Iterator[None]:
    """Make host synchronisations errors."""
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def trained(case: OptimizerCase, device: str, dtype: torch.dtype) -> nn.Module:
    model, loss = problem(device, dtype)
    optimizer = case.make(model.parameters(), model)
    train(optimizer, lambda: loss(model), 2)  # libraries start, states are made
    with contextlib.nullcontext() if device == "cpu" or case.host_syncs else no_syncs():
        train(optimizer, lambda: loss(model), STEPS)
    return model


def test_agrees_with_the_cpu_without_undeclared_host_synchronisation(case: OptimizerCase) -> None:
    there, here = trained(case, DEVICE, torch.float64), trained(case, "cpu", torch.float64)
    if case.draws_noise:  # other random numbers: the runs cannot agree
        assert all(p.isfinite().all() for p in there.parameters())
        return
    for p, q in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-8, atol=1e-10)


def test_bfloat16_stays_finite(case: OptimizerCase) -> None:
    assert all(p.isfinite().all() for p in trained(case, DEVICE, torch.bfloat16).parameters())


def test_trains_a_compiled_model(case: OptimizerCase) -> None:
    model, loss = problem(DEVICE, torch.float32)
    optimizer = case.make(model.parameters(), model)
    compiled: Any = torch.compile(model, backend="aot_eager")
    before = loss(model).item()
    train(optimizer, lambda: loss(compiled), STEPS)
    assert loss(model).item() < before


def test_resumes_to_the_bit(case: OptimizerCase) -> None:
    model, loss = problem(DEVICE, torch.float32)
    optimizer = case.make(model.parameters(), model)
    train(optimizer, lambda: loss(model), STEPS)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_state()}, file)
    train(optimizer, lambda: loss(model), STEPS)

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True, map_location="cpu")
    again, _ = problem(DEVICE, torch.float32)
    other = case.make(again.parameters(), again)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"][0])
    if DEVICE == "cuda":
        torch.cuda.set_rng_state(saved["rng"][1])
    train(other, lambda: loss(again), STEPS)
    assert_same(again.state_dict(), model.state_dict(), "parameters")


@pytest.mark.skipif(DEVICE == "cpu", reason="only CUDA counts its memory")
def test_memory_does_not_grow_with_the_steps(case: OptimizerCase) -> None:
    model, loss = problem(DEVICE, torch.float32)
    optimizer = case.make(model.parameters(), model)
    train(optimizer, lambda: loss(model), 3 * STEPS)  # windows and memories are full
    peaks = []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        train(optimizer, lambda: loss(model), STEPS)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[0] + 512  # what the allocator rounds a tensor to


def rng_state() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])]


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_sharded_model_trains_alike_or_is_refused(case: OptimizerCase) -> None:
    model, loss = problem(DEVICE, torch.float64)
    mesh = dist.init_device_mesh(DEVICE, (1,))
    fully_shard(model, mesh=mesh)
    try:
        optimizer = case.make(model.parameters(), model)
        train(optimizer, lambda: loss(model), STEPS)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        assert re.search(r"FSDP2|fully_shard|DTensor|shard", str(error)), f"a sharded model fails unclearly: {error}"
        return
    if case.draws_noise:
        return
    plain, plain_loss = problem(DEVICE, torch.float64)
    train(case.make(plain.parameters(), plain), lambda: plain_loss(plain), STEPS)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(whole, q.detach(), rtol=1e-6, atol=1e-8)
