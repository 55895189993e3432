"""Optimistic mirror descent on sharded (DTensor) parameters equals one process; what cannot be sharded is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lit_methods.optim import Ball, ExtraAdam, OptimisticAdam, OptimisticFTRL, OptimisticOMD, PNorm, Simplex
from tests.distributed.launch import run_ranks

MAKERS = {
    "adaptive": lambda ps: OptimisticOMD(ps, 2.0, average=True),
    "ball": lambda ps: OptimisticOMD(ps, 2.0, constraint=Ball(1.0)),
    "ball in turns": lambda ps: OptimisticOMD(ps, 2.0, constraint=Ball(1.0)),
    "ball each": lambda ps: OptimisticOMD(ps, 2.0, constraint=Ball(1.0, per_tensor=True)),
    "adagrad": lambda ps: OptimisticOMD(ps, 0.1, step_size="constant", mirror="adagrad"),
    "entropy": lambda ps: OptimisticOMD(ps, 0.1, step_size="constant", mirror="entropy", constraint=Simplex()),
    "optimistic adam": lambda ps: OptimisticAdam(ps, 0.05),
}


def start(name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [t.softmax(-1) if name == "entropy" else 0.1 * t for t in tensors]


def gradients(name: str, t: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(10 + t)
    both = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [None if name == "ball in turns" and i != t % 2 else g for i, g in enumerate(both)]


def on_rank(rank: int) -> dict[str, list[Tensor]]:
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for name, make in MAKERS.items():
        placements = ([Shard(0)], [Replicate()])
        params = [
            nn.Parameter(distribute_tensor(x, mesh, place)) for x, place in zip(start(name), placements, strict=True)
        ]
        optimizer = make(params)
        for t in range(8):
            for p, g, place in zip(params, gradients(name, t), placements, strict=True):
                p.grad = None if g is None else distribute_tensor(g, mesh, place)
            optimizer.step()
        before = [p.full_tensor() for p in params]
        infinite_at_the_first = torch.arange(15.0, dtype=torch.float64).view(5, 3).reciprocal()
        params[0].grad = distribute_tensor(infinite_at_the_first, mesh, [Shard(0)])
        with pytest.warns(RuntimeWarning, match="skipped a step"):
            optimizer.step()  # only the first rank's shard is not finite
        assert all(torch.equal(p.full_tensor(), x) for p, x in zip(params, before, strict=True))
        assert all(isinstance(p, DTensor) for p in params)
        results[name] = [p.full_tensor().detach() for p in params]
    sharded = nn.Parameter(distribute_tensor(torch.full((4, 2), 0.25), mesh, [Shard(0)]))
    for build, message in (
        (lambda: OptimisticOMD([sharded], mirror=PNorm(1.5)), "need whole tensors"),
        (lambda: OptimisticOMD([sharded], constraint=lambda x: x), "need whole tensors"),
        (lambda: OptimisticOMD([sharded], constraint=Simplex(dim=-2)), "split over shards"),
        (lambda: OptimisticFTRL([sharded]), "must not be DTensors"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    ExtraAdam([sharded])
    return results


def test_shards_equal_one_process() -> None:
    first, second = run_ranks(on_rank, 2)
    for name, make in MAKERS.items():
        params = [nn.Parameter(x) for x in start(name)]
        optimizer = make(params)
        for t in range(8):
            for p, g in zip(params, gradients(name, t), strict=True):
                p.grad = g
            optimizer.step()
        for p, a, b in zip(params, first[name], second[name], strict=True):
            torch.testing.assert_close(a, p.detach(), rtol=1e-10, atol=1e-10)
            assert torch.equal(a, b)
