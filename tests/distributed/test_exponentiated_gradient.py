"""The sign-preserving optimizers on parameters that FSDP2 shards over two ranks, one of which may hold nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from lit_methods.optim import AdamWExponentiated, ExponentiatedGradient, SignConstrainedSGD
from tests.distributed.launch import run_ranks

OPTIMIZERS: dict[type[Optimizer], dict[str, Any]] = {
    ExponentiatedGradient: {"lr": 0.3, "momentum": 0.9, "max_log_step": 0.5, "weight_decay": 0.01},
    AdamWExponentiated: {"lr": 0.05, "amsgrad": True, "hypentropy": 0.1},
    SignConstrainedSGD: {"lr": 0.1, "momentum": 0.9},
}


def train(net: nn.Module, optimizer: Optimizer, part: slice) -> None:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        (net(x[part]) - x[part, :1].sin()).square().mean().backward()
        optimizer.step()


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()  # 5 rows, and 1, do not halve


def train_sharded(rank: int, kind: type[Optimizer]) -> dict[str, Tensor]:
    net = make_net()
    fully_shard(net)
    optimizer = kind(net.parameters(), **OPTIMIZERS[kind])
    train(net, optimizer, slice(rank, None, 2))
    result = {name: p.full_tensor().detach() for name, p in net.named_parameters()}  # type: ignore[attr-defined]
    bad = net[2].bias.grad.to_local()  # type: ignore[index, union-attr, operator]
    bad.fill_(torch.nan)  # rank 0 holds it, rank 1 nothing: both must skip, or they would part
    with pytest.warns(RuntimeWarning, match="is not finite"):
        optimizer.step()
    return result


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_sharded_parameters_move_like_whole_ones(kind: type[Optimizer]) -> None:
    whole = make_net()
    train(whole, kind(whole.parameters(), **OPTIMIZERS[kind]), slice(None))
    for result in run_ranks(train_sharded, 2, kind):
        for name, p in whole.named_parameters():
            torch.testing.assert_close(result[name], p.detach(), rtol=1e-10, atol=1e-10)
