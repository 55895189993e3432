"""MDPO on two real gloo processes: FSDP2 parameters, and rollouts that differ between the ranks."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_methods.datamodules import RolloutDataModule
from lit_methods.optim import MDPO
from lit_methods.rl import OnPolicyMDPO
from lit_methods.rl.networks import GaussianPolicy, RunningMoments, ValueNetwork
from tests.distributed.launch import run_ranks
from tests.new_processes import act_as_torchrun


def train(net: nn.Module, optimizer: MDPO) -> None:
    g = torch.Generator().manual_seed(1)
    x, rewards = torch.randn(16, 6, generator=g).double(), torch.randn(16, 4, generator=g).double()
    for _ in range(3):

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = net(x)
            loss = -(logits.softmax(-1) * rewards).sum(-1).mean() + optimizer.proximity(logits)
            loss.backward()
            return loss

        optimizer.step(closure)


def make(shard: bool) -> tuple[nn.Module, MDPO]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    if shard:
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    return net, MDPO(net.parameters(), lr=0.05, inner_steps=4, step_size=0.5)


def train_sharded(rank: int) -> list[Tensor]:
    net, optimizer = make(shard=True)
    train(net, optimizer)
    assert all(isinstance(p, DTensor) for p in net.parameters())
    return [p.full_tensor().detach() for p in net.parameters()]


def test_fully_sharded_parameters_equal_one_process():
    per_rank = run_ranks(train_sharded, 2)
    net, optimizer = make(shard=False)
    train(net, optimizer)
    for found, p in zip(per_rank[0], net.parameters(), strict=True):
        torch.testing.assert_close(found, p.detach(), rtol=1e-10, atol=1e-10)


def moments_of_share(rank: int) -> dict[str, Any]:
    samples = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    moments = RunningMoments((3,))
    for part in samples[:, rank::2]:
        moments.update(part)
    return moments.state_dict()


def test_moments_are_those_of_all_ranks():
    samples = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    whole = RunningMoments((3,))
    for part in samples:
        whole.update(part)
    for found in run_ranks(moments_of_share, 2):
        torch.testing.assert_close(found, dict(whole.state_dict()), rtol=1e-10, atol=1e-12)


class Seen(pl.Callback):
    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch.observations)


def train_on_policy(rank: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    act_as_torchrun(rank, 2)
    torch.manual_seed(3)
    module = OnPolicyMDPO(GaussianPolicy(3, 1, [8]), ValueNetwork(3, [8]), 3)
    torch.manual_seed(rank)
    seen = Seen()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, callbacks=[seen],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    data = RolloutDataModule("Pendulum-v1", num_envs=2, rollout_steps=40, iterations_per_epoch=2)
    trainer.fit(module, data)
    return seen.batches, {
        name: value.clone() for name, value in module.state_dict().items() if name != "recent_returns"
    }


def test_ranks_collect_their_own_rollouts_and_learn_the_same():
    (first, state), (second, other) = run_ranks(train_on_policy, 2)
    assert not torch.equal(first[0], second[0])
    for name, value in state.items():
        assert torch.equal(value, other[name]), name
    assert state["observation_moments.count"] == 2 * 2 * 2 * 40
