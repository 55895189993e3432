"""Consensus-based optimization of FSDP2 modules: each of two ranks holds its columns of all particles."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lit_methods.optim import (
    CBO,
    AdamCBO,
    ConsensusBasedSampling,
    ConsensusHopping,
    MemoryCBO,
    PolarizedCBO,
    particle_losses,
)
from lit_methods.optim.cbo import EffectiveSampleSize, InitialCloud, ParticleBatches
from lit_methods.optim.cbo.swarm import ParticleOptimizer
from tests.distributed.launch import run_ranks
from tests.new_processes import act_as_torchrun

STEPS = 4
N = 10
SETTINGS: dict[str, tuple[type, dict[str, Any]]] = {
    "batches": (CBO, {"batches": ParticleBatches(5)}),
    "isotropic": (CBO, {"batches": ParticleBatches(None), "noise": "isotropic", "sigma": 0.2}),
    "stalled": (CBO, {"batches": ParticleBatches(None), "stall_tol": 10.0, "init": InitialCloud(around_current=True)}),
    "two runs": (CBO, {"batches": ParticleBatches(5), "num_runs": 2, "alpha": EffectiveSampleSize(0.5)}),
    "hopping": (ConsensusHopping, {}),
    "sampling": (ConsensusBasedSampling, {"num_runs": 2}),
    "memory": (MemoryCBO, {}),
    "polarized": (PolarizedCBO, {"noise": "isotropic", "sigma": 0.2, "kappa": 2.0}),
    "adam": (AdamCBO, {}),
}


def net() -> nn.Sequential:
    """Its last layer has one row, so that the second rank has nothing of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()
    return x, x.sin().sum(1, keepdim=True)


def columns(rank: int) -> Tensor:
    """Where this rank's coordinates are in one process's."""
    kept, start = [], 0
    for p in net().parameters():
        rows = torch.arange(start, start + p.numel()).view(p.shape).chunk(2)
        kept += [rows[rank].flatten()] if rank < len(rows) else []
        start += p.numel()
    return torch.cat(kept)


def noise(patch: pytest.MonkeyPatch, runs: int, kept: Any) -> None:
    """Give a process its columns of the noise that one process would draw."""
    g = torch.Generator().manual_seed(7)

    def fill(self, x: Tensor, mean: float, std: float) -> None:
        draws = torch.randn(runs * N, 26, generator=g, dtype=torch.float64)
        x.copy_(mean + std * (draws[:, :N] if x.shape[1] == N else draws[:, kept]))  # (N, N) mixes particles

    patch.setattr(ParticleOptimizer, "fill_normal", fill)


def sharded() -> nn.Module:
    module = net()
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    return module


def step(module: nn.Module, optimizer: Any, rows: slice) -> None:
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(x[rows]), y[rows])
        loss.backward()
        return loss

    optimizer.step(closure)


def full(module: nn.Module) -> list[Tensor]:
    return [p.detach().full_tensor().clone() for p in module.parameters()]  # type: ignore[operator]


def run_on_rank(rank: int, folder: str) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message="with sigma")
    rows = slice(rank, None, 2)
    results: dict[str, Any] = {}
    for name, (kind, arguments) in SETTINGS.items():
        with pytest.MonkeyPatch.context() as patch:
            noise(patch, arguments.get("num_runs", 1), columns(rank))
            module = sharded()
            optimizer = kind(module.named_parameters(), num_particles=N, seed=3, **arguments)
            for _ in range(STEPS):
                step(module, optimizer, rows)
        results[name] = {
            "model": full(module),
            "spread": optimizer.spread(),
            "best": torch.cat([v.flatten() for v in optimizer.best_particle().values()]),
            "particles": torch.cat([v.flatten(1) for v in optimizer.particles.values()], 1),
        }
    results["resumed"] = resume(rows, folder)
    results["messages"] = messages(rows)
    line = nn.Linear(3, 1).double()  # one row each: nothing is left for the second rank
    fully_shard(line, mesh=init_device_mesh("cpu", (2,)))
    optimizer = CBO(line.named_parameters(), num_particles=N, seed=0)
    for _ in range(20):
        step(line, optimizer, rows)
    results["line"] = full(line)
    torch.manual_seed(rank)  # the seed must be agreed on
    results["drawn"] = CBO(sharded(), num_particles=N).particles["0.bias"]
    return results


def resume(rows: slice, folder: str) -> bool:
    """Train; go on from a distributed checkpoint: the same to the bit."""

    def build() -> tuple[nn.Module, CBO]:
        module = sharded()
        return module, CBO(module.named_parameters(), num_particles=N, batches=ParticleBatches(5), num_runs=2)

    module, optimizer = build()
    for _ in range(2):
        step(module, optimizer, rows)
    state = {"model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    for _ in range(3):
        step(module, optimizer, rows)
    other, resumed = build()
    state = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, resumed)}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, resumed, state["optimizer"])
    for _ in range(3):
        step(other, resumed, rows)
    same = [torch.equal(a, b) for a, b in zip(full(module), full(other), strict=True)]
    same += [torch.equal(value, resumed.particles[name]) for name, value in optimizer.particles.items()]
    return all([*same, torch.equal(optimizer.best_losses(), resumed.best_losses())])


def messages(rows: slice) -> list[str]:
    """What is refused, and what is warned of."""
    module, half = sharded(), net()
    fully_shard(half[0], mesh=init_device_mesh("cpu", (2,)))
    plain = CBO(net(), num_particles=N)
    plain.step(particle_losses(net(), nn.functional.mse_loss, data()))
    attempts = [
        lambda: CBO(module, num_particles=N, shard="particles"),
        lambda: CBO(module, num_particles=N, gradient_drift=0.1),
        lambda: CBO(half, num_particles=N),
        lambda: CBO(module, num_particles=N).step(lambda p: p["0.bias"].sum(1)),
        lambda: CBO(module, num_particles=N).load_state_dict(plain.state_dict()),
    ]
    found = []
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            found.append(str(error))
    x, y = data()
    with pytest.warns(UserWarning, match="same loss") as record, torch.no_grad():
        CBO(module, num_particles=N, batches=ParticleBatches(None)).step(
            lambda: nn.functional.mse_loss(module(x[rows]), y[rows]).detach()
        )
    return [*found, str(record[0].message)]


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> CBO:
        return CBO(self.named_parameters(), num_particles=N, batches=ParticleBatches(5), seed=0)


def fit_on_rank(rank: int, folder: str) -> list[list[Tensor]]:
    """Automatic optimization: four epochs, two and then two more, by either kind of checkpoint."""
    act_as_torchrun(rank, 2)
    warnings.simplefilter("ignore")
    results = []
    for distributed in (False, True):
        path = f"{folder}/{distributed}.ckpt"
        for epochs, start in ((4, None), (2, None), (4, path)):
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=2,
                strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=distributed),
                max_epochs=epochs,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
            module = Regression()
            trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=2), ckpt_path=start)
            if epochs == 2:
                trainer.save_checkpoint(path)
            else:
                results.append(full(module.net))
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run_on_rank, 2, str(Path(tmp_path_factory.mktemp("dcp"))))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:with sigma")
def test_equals_one_process_given_the_same_noise(name, ranks, monkeypatch) -> None:
    kind, arguments = SETTINGS[name]
    noise(monkeypatch, arguments.get("num_runs", 1), slice(None))
    module = net()
    optimizer = kind(module, num_particles=N, seed=3, **arguments)
    for _ in range(STEPS):
        step(module, optimizer, slice(None))
    particles = torch.cat([v.flatten(1) for v in optimizer.particles.values()], 1)
    best = torch.cat([v.flatten() for v in optimizer.best_particle().values()])
    for rank, found in enumerate(run[name] for run in ranks):
        for value, p in zip(found["model"], module.parameters(), strict=True):
            torch.testing.assert_close(value, p.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found["particles"], particles[:, columns(rank)], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found["best"], best[columns(rank)], rtol=1e-10, atol=1e-10)
        assert found["spread"] == pytest.approx(optimizer.spread(), rel=1e-10)


def test_resumes_to_the_bit_from_a_distributed_checkpoint(ranks) -> None:
    assert all(run["resumed"] for run in ranks)


def test_a_rank_without_coordinates_takes_part(ranks) -> None:
    x, y = data()
    weight, bias = ranks[0]["line"]
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["line"], ranks[1]["line"], strict=True))
    assert nn.functional.mse_loss(x @ weight.T + bias, y) < 0.5 * y.square().mean()


def test_ranks_draw_other_noise(ranks) -> None:
    first, second = (run["drawn"] for run in ranks)
    assert first.shape == (N, 3)
    assert second.shape == (N, 2)
    assert not torch.equal(first[:, :2], second)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, "shard must be 'data' with DTensor"),
        (1, "gradient_drift must be 0 with DTensor"),
        (2, "params must all be sharded over all 2 ranks"),
        (3, "closure must return the loss"),
        (4, "state_dict is of parameters that are not DTensors"),
        (5, r"reshard_after_forward=True"),
    ],
)
def test_what_cannot_be_done_is_named(which, message, ranks) -> None:
    assert all(message in run["messages"][which] for run in ranks)


def test_lightning_resumes_to_the_bit(tmp_path) -> None:
    first, second = run_ranks(fit_on_rank, 2, str(tmp_path))
    for whole, resumed in (first[:2], first[2:]):
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    x, y = data()
    module = net()
    before = nn.functional.mse_loss(module(x), y)
    for p, value in zip(module.parameters(), first[0], strict=True):
        p.data.copy_(value)
    assert nn.functional.mse_loss(module(x), y) < before
