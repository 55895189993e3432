"""SSO and ArmijoSGD on two real gloo processes: DDP, unequal shares, local inner steps, FSDP2."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

from lit_methods.optim import SSO, ArmijoSGD
from lit_methods.optim.sso import GaussNewton, InnerSolver
from lit_methods.optim.sso.solvers import inner_solver
from tests.distributed.launch import run_ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "gauss_newton": {"weight_decay": 0.01},
    "cg": {"inner": "cg"},
    "lbfgs": {"inner": "lbfgs"},
    "armijo": {"inner": "armijo"},
    "adam": {"inner": "adam"},
    "rule armijo": {"rule": "armijo"},
    "rule adagrad": {"rule": "adagrad"},
    "rule adagrad_per_example": {"rule": "adagrad_per_example"},
    "sum": {"reduction": "sum", "rule": "armijo"},
    "clipped": {"max_target_grad_norm": 0.5},
}
PARTS = (slice(0, 10), slice(10, 16))
STEPS = 5


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(t: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0), torch.arange(t, t + 16)


def four(inner: str | InnerSolver) -> InnerSolver:
    return dataclasses.replace(inner_solver(inner), steps=4)


def flat(net: nn.Module) -> Tensor:
    full = (p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters())
    return torch.cat([p.detach().flatten() for p in full])


def train(net: nn.Module, part: slice = slice(None), **options: Any) -> Tensor:
    optimizer = SSO(net.parameters(), **{"lr": 1.0, **options, "inner": four(options.get("inner", "gauss_newton"))})
    reduction = options.get("reduction", "mean")
    for t in range(STEPS):
        x, y, index = (tensor[part] for tensor in batch(t))
        optimizer.step(
            lambda x=x, y=y, i=index: (net(x), lambda z: functional.cross_entropy(z, y, reduction=reduction), i)
        )
    return flat(net)


def capture(net: nn.Module, replica: nn.Module, part: slice, **options: Any) -> Tensor:
    optimizer = SSO(
        net.parameters(),
        target_module=net,
        **{"lr": 1.0, **options, "inner": four(options.get("inner", "gauss_newton"))},
    )
    for t in range(STEPS):
        x, y, _ = (tensor[part] for tensor in batch(t))
        optimizer.zero_grad()
        functional.cross_entropy(replica(x), y).backward()
        optimizer.step()
    return flat(net)


def armijo_sgd(net: nn.Module, replica: nn.Module, part: slice) -> Tensor:
    optimizer = ArmijoSGD(net.parameters(), lr=50.0)
    for t in range(STEPS):
        x, y, _ = (tensor[part] for tensor in batch(t))

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(replica(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return flat(net)


def ranks(rank: int) -> dict[str, Tensor]:
    torch.manual_seed(rank)
    results = {name: train(make_net(), PARTS[rank], **options) for name, options in VARIANTS.items()}
    halves = (slice(0, 8), slice(8, 16))
    for name, run in (("ddp", capture), ("armijo_sgd", armijo_sgd)):
        net = make_net()
        results[name] = run(net, nn.parallel.DistributedDataParallel(net), halves[rank])
    for every in (2, 4):
        results[f"sync {every}"] = train(make_net(), PARTS[rank], inner=GaussNewton(steps=4, sync_every=every))
    results["padding"] = train(
        make_net(), PARTS[rank], num_items=lambda slope: torch.full((len(slope),), rank == 0), rule="armijo"
    )
    mesh = init_device_mesh("cpu", (2,))
    for inner in ("gauss_newton", "armijo", "adam", "lbfgs"):
        net = make_net()
        for module in (net[0], net[2], net):
            fully_shard(module, mesh=mesh)
        results[f"fsdp {inner}"] = capture(net, net, halves[rank], inner=inner)
    with pytest.raises(RuntimeError, match="ConjugateGradient needs forward-mode AD"):
        capture(net, net, halves[rank], inner="cg")
    old = FullyShardedDataParallel(make_net(), device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="FSDP1; use FSDP2"):
        train(old)
    bad = make_net()
    x, y, _ = batch(0)
    factor = float("nan") if rank else 1.0
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        SSO(bad.parameters()).step(lambda: (bad(x), lambda z: factor * functional.cross_entropy(z, y)))
    assert torch.equal(flat(bad), flat(make_net()))
    dist.barrier()
    return results


@pytest.fixture(scope="module")
def both() -> list[dict[str, Tensor]]:
    return run_ranks(ranks, 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_unequal_shares_equal_one_process_on_the_joint_batch(both, name) -> None:
    assert torch.equal(both[0][name], both[1][name])
    torch.testing.assert_close(both[0][name], train(make_net(), **VARIANTS[name]), rtol=1e-9, atol=1e-10)


def test_a_rank_with_nothing_but_padding_follows_the_other(both) -> None:
    assert torch.equal(both[0]["padding"], both[1]["padding"])
    expected = train(make_net(), PARTS[0], rule="armijo")
    torch.testing.assert_close(both[0]["padding"], expected, rtol=1e-9, atol=1e-10)


def test_ddp_equals_one_process(both) -> None:
    net = make_net()
    assert torch.equal(both[0]["ddp"], both[1]["ddp"])
    torch.testing.assert_close(both[0]["ddp"], capture(net, net, slice(None)), rtol=1e-9, atol=1e-10)
    net = make_net()
    assert torch.equal(both[0]["armijo_sgd"], both[1]["armijo_sgd"])
    torch.testing.assert_close(both[0]["armijo_sgd"], armijo_sgd(net, net, slice(None)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("every", [2, 4])
def test_local_inner_steps_end_in_the_same_parameters_on_all_ranks(both, every) -> None:
    local = both[0][f"sync {every}"]
    assert torch.equal(local, both[1][f"sync {every}"])
    exact, start = both[0]["gauss_newton"], flat(make_net())
    assert not torch.equal(local, exact)
    assert (local - exact).norm() < 0.5 * (exact - start).norm()


@pytest.mark.parametrize("inner", ["gauss_newton", "armijo", "adam", "lbfgs"])
def test_fsdp2_equals_one_process(both, inner) -> None:
    """Of shards that are not even. Without forward-mode derivatives the Gauss-Newton length comes from differences."""
    net = make_net()
    expected = capture(net, net, slice(None), inner=inner)
    close = {"rtol": 1e-6, "atol": 1e-7} if inner == "gauss_newton" else {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(both[0][f"fsdp {inner}"], expected, **close)
