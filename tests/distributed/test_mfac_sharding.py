"""MFAC on two real gloo processes: sharded window, consolidation, resume on other rank counts, DDP, FSDP2."""

import copy
import math
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lit_methods.optim import MFAC
from lit_methods.optim.foundation.flat import is_dtensor, local_tensor
from tests.distributed.launch import run_ranks
from tests.new_processes import act_as_torchrun

OPTIONS: dict[str, Any] = {"lr": 1e-2, "num_grads": 5, "damping": 1e-2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "decoupled rank2": {"weight_decay": 0.1, "decoupled_weight_decay": True, "solver": "rank2"},
    "float16": {"history_dtype": "float16"},
    "bfloat16 filled": {"history_dtype": "bfloat16", "window_scale": "filled"},
    "excluded": {"exclude_zero_weights": True, "momentum": 0.5},
}


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2), nn.Tanh(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight[:, 2] = 0.0
    return net


def batch(t: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    return x[part], x[part, :1].sin()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, part: slice = slice(None)) -> None:
    for t in steps:
        x, y = batch(t, part)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        if t == 8:  # one bad gradient, on whichever rank holds that coordinate
            bad = next(net.parameters()).grad
            if not is_dtensor(bad) or dist.get_rank() == dist.get_world_size() - 1:
                local_tensor(bad).view(-1)[-1] = math.nan
        optimizer.step()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def run_single(**options: Any) -> tuple[nn.Module, MFAC]:
    net = make_net()
    optimizer = MFAC(net.parameters(), **{**OPTIONS, **options})
    train(net, optimizer, range(12))
    return net, optimizer


# ---------------------------------------------------------------------------------------------- sharded over DDP ranks


def sharded_ranks(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, options in VARIANTS.items():
        net = make_net()
        optimizer = MFAC(net.parameters(), **OPTIONS, **options, shard_history=True)
        train(net, optimizer, range(7))
        with pytest.raises(RuntimeError, match="consolidate_state_dict"):
            optimizer.state_dict()
        width = optimizer.state["mfac"]["history"].shape[1]
        optimizer.consolidate_state_dict()
        saved = [copy.deepcopy((net.state_dict(), optimizer.state_dict())) if rank == 0 else None]
        if rank == 1:
            with pytest.raises(RuntimeError, match="consolidate_state_dict"):
                optimizer.state_dict()
        dist.broadcast_object_list(saved)
        train(net, optimizer, range(7, 12))

        assert saved[0] is not None
        resumed_net = make_net()
        resumed = MFAC(resumed_net.parameters(), **OPTIONS, **options, shard_history=True)
        resumed_net.load_state_dict(saved[0][0])
        resumed.load_state_dict(saved[0][1])
        assert resumed.state["mfac"]["history"].shape[1] == width
        train(resumed_net, resumed, range(7, 12))
        results[name] = {"params": flat(net), "resumed": flat(resumed_net), "saved": saved[0], "width": width}
    return results


@pytest.fixture(scope="module")
def sharded() -> list[dict[str, Any]]:
    return run_ranks(sharded_ranks, 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sharded_window_equals_one_process(sharded, variant):
    net, optimizer = run_single(**VARIANTS[variant])
    first, second = (ranks[variant] for ranks in sharded)
    assert torch.equal(first["params"], second["params"])  # ranks stay bit-identical
    torch.testing.assert_close(first["params"], flat(net), rtol=0, atol=1e-10)
    columns = optimizer.state["mfac"]["history"].shape[1]
    assert first["width"] == second["width"] == math.ceil(columns / 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_on_the_same_ranks_is_bitwise(sharded, variant):
    for ranks in sharded:
        assert torch.equal(ranks[variant]["params"], ranks[variant]["resumed"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_consolidated_state_resumes_on_one_process(sharded, variant):
    net_state, optimizer_state = sharded[0][variant]["saved"]
    net = make_net()
    net.load_state_dict(net_state)
    optimizer = MFAC(net.parameters(), **OPTIONS, **VARIANTS[variant])
    optimizer.load_state_dict(optimizer_state)
    train(net, optimizer, range(7, 12))
    expected = sharded[0][variant]["params"]
    torch.testing.assert_close(flat(net), expected, rtol=0, atol=1e-6)


def single_to_sharded_ranks(rank: int, saved: tuple[dict, dict]) -> Tensor:
    net = make_net()
    net.load_state_dict(saved[0])
    optimizer = MFAC(net.parameters(), **OPTIONS, momentum=0.9, shard_history=True)
    optimizer.load_state_dict(saved[1])
    train(net, optimizer, range(7, 12))
    return flat(net)


def growing_ranks(rank: int) -> Tensor:
    return flat(growing(shard_history=True))


def growing(**options: Any) -> nn.Module:
    """The head trains alone for four steps, then the rest of the network joins."""
    net = make_net()
    optimizer = MFAC(net[4].parameters(), **OPTIONS, **options)
    train(net, optimizer, range(4))
    optimizer.add_param_group({"params": [*net[2].parameters(), *net[0].parameters()], "lr": 1e-3})
    train(net, optimizer, range(4, 12))
    return net


def ddp_ranks(rank: int) -> Tensor:
    net = make_net()
    ddp = nn.parallel.DistributedDataParallel(net)
    optimizer = MFAC(ddp.parameters(), **OPTIONS, momentum=0.9, shard_history=True)
    train(ddp, optimizer, range(12), slice(8 * rank, 8 * rank + 8))
    return flat(net)


def more_ranks(rank: int, saved: tuple[dict, dict]) -> dict[str, Tensor]:
    fsdp1 = FullyShardedDataParallel(make_net(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = MFAC(fsdp1.parameters(), **OPTIONS)
    fsdp1(batch(0)[0]).sum().backward()
    with pytest.raises(RuntimeError, match="inside FSDP1; use FSDP2"):
        optimizer.step()
    return {
        "from one": single_to_sharded_ranks(rank, saved),
        "growing": growing_ranks(rank),
        "ddp": ddp_ranks(rank),
    }


@pytest.fixture(scope="module")
def more() -> list[dict[str, Tensor]]:
    net = make_net()
    optimizer = MFAC(net.parameters(), **OPTIONS, momentum=0.9)
    train(net, optimizer, range(7))
    return run_ranks(more_ranks, 2, (net.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("scenario", ["from one", "growing", "ddp"])
def test_other_ways_to_shard_equal_one_process(more, scenario):
    """A one-process checkpoint on two ranks; a group added mid-run; real DDP (and no FSDP1) against the joint batch."""
    expected = flat(growing()) if scenario == "growing" else flat(run_single(momentum=0.9)[0])
    assert torch.equal(more[0][scenario], more[1][scenario])
    torch.testing.assert_close(more[0][scenario], expected, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------------- FSDP2 (DTensor)


def fsdp_net(mesh_shape: tuple[int, ...]) -> nn.Module:
    net = make_net()
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def full(net: nn.Module) -> Tensor:
    return torch.cat([(p.full_tensor() if is_dtensor(p) else p).detach().flatten() for p in net.parameters()])


def fsdp_ranks(rank: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    # On a (2, 1) mesh everything is replicated: summing over both ranks without care would double the Gram matrix.
    for name, mesh_shape in {"shard": (2,), "replicate": (2, 1)}.items():
        for variant in ("plain", "momentum", "decoupled rank2", "float16"):
            net = fsdp_net(mesh_shape)
            optimizer = MFAC(net.parameters(), **OPTIONS, **VARIANTS[variant])
            train(net, optimizer, range(12))
            results[f"{name} {variant}"] = full(net)

    options = {**OPTIONS, "momentum": 0.9, "history_dtype": "bfloat16", "solver": "rank2"}
    net = fsdp_net((2,))
    optimizer = MFAC(net.parameters(), **options)
    train(net, optimizer, range(7))
    weights = {key: value.full_tensor() for key, value in net.state_dict().items()}
    settings = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=settings))
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=folder)
    if rank == 0:
        results["whole"] = whole
        results["weights"] = weights
    train(net, optimizer, range(7, 12))
    results["uninterrupted"] = full(net)

    for how in ("whole", "shards"):
        net = fsdp_net((2,))
        set_model_state_dict(net, dict(weights), options=StateDictOptions(full_state_dict=True))
        optimizer = MFAC(net.parameters(), **options)
        if how == "whole":
            settings = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(net, optimizer, whole, options=settings)
        else:
            state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
            dcp.load(state, checkpoint_id=folder)
            set_optimizer_state_dict(net, optimizer, state["optimizer"])
        assert optimizer.state["mfac"]["history"].dtype == torch.bfloat16
        assert optimizer.state["mfac"]["gram"].dtype == torch.float64
        train(net, optimizer, range(7, 12))
        results[f"resumed from {how}"] = full(net)

    for bad in ({"shard_history": True}, {"history_device": "cpu"}, {"exclude_zero_weights": True}):
        with pytest.raises(ValueError, match="cannot be combined with DTensor parameters"):
            MFAC(net.parameters(), **bad)
    return results


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(fsdp_ranks, 2, str(tmp_path_factory.mktemp("dcp")))


@pytest.mark.parametrize("mesh", ["shard", "replicate"])
@pytest.mark.parametrize("variant", ["plain", "momentum", "decoupled rank2", "float16"])
def test_fsdp2_equals_one_process(fsdp, mesh, variant):
    expected = flat(run_single(**VARIANTS[variant])[0])
    for ranks in fsdp:
        torch.testing.assert_close(ranks[f"{mesh} {variant}"], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("how", ["whole", "shards"])
def test_fsdp2_resume_is_bitwise(fsdp, how):
    for ranks in fsdp:
        assert torch.equal(ranks[f"resumed from {how}"], ranks["uninterrupted"])


def test_fsdp2_state_resumes_on_one_process(fsdp):
    net = make_net()
    net.load_state_dict(fsdp[0]["weights"])
    optimizer = MFAC(net.parameters(), **OPTIONS, momentum=0.9, history_dtype="bfloat16", solver="rank2")
    names = [name for name, _ in net.named_parameters()]
    state = fsdp[0]["whole"]
    assert set(state["state"]) == set(names)
    assert state["state"]["0.weight"]["history"].shape == (5, 7, 6)
    optimizer.load_state_dict(state)
    train(net, optimizer, range(7, 12))
    torch.testing.assert_close(flat(net), fsdp[0]["uninterrupted"], rtol=0, atol=1e-6)


def failing_ranks(rank: int) -> None:
    if rank == 1:
        raise ZeroDivisionError("on rank one")


def test_launch_reports_a_failing_rank():
    with pytest.raises(Exception, match="on rank one"):
        run_ranks(failing_ranks, 2)


# -------------------------------------------------------------------------------------------------- inside a Trainer


class Regression(pl.LightningModule):
    def __init__(self, fsdp: bool, **options: Any) -> None:
        super().__init__()
        self.net = make_net()
        self.fsdp = fsdp
        self.options = options

    def configure_model(self) -> None:
        if self.fsdp:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[0][:, :1].sin()).square().mean()

    def configure_optimizers(self) -> MFAC:
        return MFAC(self.parameters(), **OPTIONS, **self.options)


def trainer_ranks(rank: int, folder: str) -> dict[str, list[Tensor]]:
    act_as_torchrun(rank, 2)
    warnings.simplefilter("ignore")
    x = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = {}
    for name, options in {
        "ddp": {"shard_history": True, "momentum": 0.9},
        "fsdp": {"momentum": 0.9},
        "fsdp shards": {"solver": "rank2"},
        "fsdp no history": {"save_history": False},
    }.items():
        results[name] = []
        for resume_at in (None, 2):
            for epochs in (4,) if resume_at is None else (2, 4):
                strategy = ModelParallelStrategy(
                    data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=name == "fsdp shards"
                )
                trainer = pl.Trainer(
                    accelerator="cpu",
                    devices=2,
                    strategy="ddp" if name == "ddp" else strategy,
                    max_epochs=epochs,
                    logger=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    enable_checkpointing=False,
                )
                module = Regression(name != "ddp", **options)
                data = DataLoader(TensorDataset(x), batch_size=8)
                path = f"{folder}/{name}.ckpt"
                trainer.fit(module, data, ckpt_path=path if resume_at and epochs == 4 else None)
                if epochs == 2:
                    trainer.save_checkpoint(path)
            results[name].append(full(module))
    return results


@pytest.fixture(scope="module")
def in_trainer(tmp_path_factory) -> list[dict[str, list[Tensor]]]:
    return run_ranks(trainer_ranks, 2, str(tmp_path_factory.mktemp("trainer")))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp shards"])
def test_lightning_resume_is_bitwise(in_trainer, strategy):
    """Sharded window under DDP; FSDP2 with one consolidated file and with a distributed checkpoint."""
    uninterrupted, resumed = in_trainer[0][strategy]
    assert torch.equal(uninterrupted, resumed)
    assert torch.equal(uninterrupted, in_trainer[1][strategy][0])


def test_lightning_strategies_agree(in_trainer):
    torch.testing.assert_close(in_trainer[0]["ddp"][0], in_trainer[0]["fsdp"][0], rtol=0, atol=1e-10)
    uninterrupted, restarted = in_trainer[0]["fsdp no history"]
    assert restarted.isfinite().all()
    assert not torch.equal(uninterrupted, restarted)
