"""Consensus-based optimization on two real processes: particles or data shared out."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_methods.optim import CBO, AdamCBO, ConsensusHopping, MemoryCBO, particle_losses
from lit_methods.optim.cbo import EffectiveSampleSize, ParticleBatches
from tests.cli import run_new_process
from tests.contract.cases import MODULES
from tests.contract.compare import assert_same
from tests.contract.module_checks import resume_callbacks, write_config
from tests.distributed.launch import run_ranks

STEPS = 5
N = 8


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        return module, (torch.randn(10, 3).double(), torch.randint(2, (10,)))


def build(module: nn.Module, shard: str, kind: type = CBO, **arguments) -> CBO | ConsensusHopping:
    given = {"num_particles": N, "shard": shard, **arguments}
    if kind is CBO:
        given = {"batches": ParticleBatches(None), **given}
    return kind(module, **given)


def all_jobs(rank: int) -> dict:
    return {
        "sharded": [train_sharded(rank, *arguments) for arguments in SHARDED],
        "data": train_on_half_the_data(rank),
        "resumed": resume_sharded(rank),
        "refused": too_many_ranks(rank),
    }


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    return run_ranks(all_jobs, 2)


def rank_noise(runs: int, rows: slice):
    """A source of noise that gives a rank the ``rows`` of each run of what one process would draw."""
    generator = torch.Generator().manual_seed(7)

    def fill(self, x: Tensor, mean: float, std: float) -> None:
        draws = torch.randn(runs, N, 26, generator=generator, dtype=torch.float64)
        x.copy_(mean + std * draws[:, rows].flatten(0, 1))

    return fill


def train_sharded(rank: int, kind: type, arguments: dict) -> dict:
    module, batch = problem()
    half = N // 2
    with pytest.MonkeyPatch.context() as patch:
        rows = slice(rank * half, (rank + 1) * half)
        patch.setattr(kind, "fill_normal", rank_noise(arguments.get("num_runs", 1), rows))
        return run_sharded(module, batch, kind, arguments)


def run_sharded(module: nn.Module, batch: tuple[Tensor, Tensor], kind: type, arguments: dict) -> dict:
    optimizer = build(module, "particles", kind, **arguments)
    for _ in range(STEPS):
        loss = optimizer.step(particle_losses(module, nn.functional.cross_entropy, batch))
    best = optimizer.best_particle()
    variance = optimizer.variance()
    optimizer.consolidate_state_dict()
    particles = optimizer.state_dict()["state"]["swarm"]["particles"] if dist.get_rank() == 0 else None
    return {
        "model": module.state_dict(),
        "loss": loss,
        "best": best,
        "best losses": optimizer.best_losses(),
        "variance": variance,
        "all": particles,
    }


SHARDED = [
    (CBO, {"stall_tol": 0.0}),
    (CBO, {"stall_tol": 0.0, "noise": "isotropic", "alpha": EffectiveSampleSize(0.5)}),
    (CBO, {"num_runs": 3}),
    (ConsensusHopping, {}),
    (ConsensusHopping, {"num_runs": 2, "alpha": EffectiveSampleSize(0.5)}),
    (MemoryCBO, {"num_runs": 2}),
    (AdamCBO, {}),
]


@pytest.mark.parametrize("which", range(len(SHARDED)))
@pytest.mark.filterwarnings("ignore:with sigma")
def test_sharded_particles_equal_one_process_given_the_same_noise(which, runs, monkeypatch) -> None:
    kind, arguments = SHARDED[which]
    ranks = [run["sharded"][which] for run in runs]
    module, batch = problem()
    monkeypatch.setattr(kind, "fill_normal", rank_noise(arguments.get("num_runs", 1), slice(None)))
    optimizer = build(module, "particles", kind, **arguments)
    for _ in range(STEPS):
        loss = optimizer.step(particle_losses(module, nn.functional.cross_entropy, batch))
    for name, value in module.state_dict().items():
        assert torch.equal(ranks[0]["model"][name], ranks[1]["model"][name]), "ranks differ"
        torch.testing.assert_close(ranks[0]["model"][name], value, rtol=1e-10, atol=1e-10)
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], loss)
        torch.testing.assert_close(rank["best"], optimizer.best_particle())
        torch.testing.assert_close(rank["best losses"], optimizer.best_losses())
        torch.testing.assert_close(rank["variance"], optimizer.variance())
    torch.testing.assert_close(ranks[0]["all"], optimizer.state_dict()["state"]["swarm"]["particles"])


def train_on_half_the_data(rank: int) -> dict:
    torch.manual_seed(rank)  # global generators differ: the seed must be agreed on
    module, (x, y) = problem()
    optimizer = build(module, "data", batches=ParticleBatches(4), seed=3)
    for _ in range(STEPS):
        optimizer.step(particle_losses(module, nn.functional.cross_entropy, (x[rank::2], y[rank::2])))
    unseeded = build(problem()[0], "data").particles
    return {"model": module.state_dict(), "unseeded": unseeded}


def test_sharded_data_equals_one_process_on_the_joint_batch(runs) -> None:
    ranks = [run["data"] for run in runs]
    module, batch = problem()
    optimizer = build(module, "data", batches=ParticleBatches(4), seed=3)
    for _ in range(STEPS):
        optimizer.step(particle_losses(module, nn.functional.cross_entropy, batch))
    for name, value in module.state_dict().items():
        assert torch.equal(ranks[0]["model"][name], ranks[1]["model"][name])
        torch.testing.assert_close(ranks[0]["model"][name], value, rtol=1e-10, atol=1e-10)
    for name, value in ranks[0]["unseeded"].items():
        assert torch.equal(value, ranks[1]["unseeded"][name]), "without a seed the ranks must agree on one"


def resume_sharded(rank: int) -> dict:
    module, batch = problem()
    losses = particle_losses(module, nn.functional.cross_entropy, batch)
    optimizer = build(module, "particles", batches=ParticleBatches(4), seed=1)
    different = not torch.equal(*gathered(optimizer.particles["0.weight"]))
    optimizer.step(losses)
    try:
        optimizer.state_dict()
        refused = False
    except RuntimeError as error:
        refused = "consolidate_state_dict" in str(error)
    optimizer.consolidate_state_dict()
    box = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(box)
    saved, weights = box[0], {k: v.clone() for k, v in module.state_dict().items()}
    for _ in range(STEPS):
        optimizer.step(losses)
    other, _ = problem()
    other.load_state_dict(weights)
    resumed = build(other, "particles", batches=ParticleBatches(4), seed=99)
    resumed.load_state_dict(saved)
    for _ in range(STEPS):
        resumed.step(particle_losses(other, nn.functional.cross_entropy, batch))
    same = all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    return {"same": same, "refused": refused, "different": different, "saved": saved}


def gathered(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


def test_sharded_particles_resume_to_the_bit_and_load_on_one_process(runs) -> None:
    ranks = [run["resumed"] for run in runs]
    for rank in ranks:
        assert rank["same"]
        assert rank["refused"]
        assert rank["different"], "ranks must hold different particles"
    module, batch = problem()
    optimizer = build(module, "particles", batches=ParticleBatches(4))
    optimizer.load_state_dict(ranks[0]["saved"])
    assert torch.equal(
        optimizer.particles["0.weight"].flatten(1), ranks[0]["saved"]["state"]["swarm"]["particles"][0, :, :12]
    )
    optimizer.step(particle_losses(module, nn.functional.cross_entropy, batch))


def too_many_ranks(rank: int) -> str:
    try:
        CBO(problem()[0], num_particles=5, batches=ParticleBatches(None), shard="particles").variance()
    except ValueError as error:
        return str(error)
    return ""


def test_particles_that_cannot_be_shared_out_are_refused(runs) -> None:
    assert all("multiples of the 2 ranks, got 5" in run["refused"] for run in runs)


@pytest.mark.slow
def test_a_trainer_with_sharded_particles_resumes_to_the_bit(tmp_path) -> None:
    case = MODULES["lit_methods.black_box.CBOModule"]
    config = copy.deepcopy(case.config)
    config["model"]["init_args"]["optimizer"]["init_args"]["shard"] = "particles"
    case = dataclasses.replace(case, config=config)
    two = {"strategy": "ddp", "devices": 2, "max_steps": 6}
    path = write_config(case, tmp_path, **two, callbacks=resume_callbacks("whole"))
    run_new_process(tmp_path, "fit", "--config", path, ranks=2)
    path = write_config(case, tmp_path, **two, callbacks=resume_callbacks("resumed"))
    run_new_process(tmp_path, "fit", "--config", path, "--ckpt_path", "whole/step=3.ckpt", ranks=2)
    whole, resumed = (torch.load(tmp_path / run / "step=6.ckpt", weights_only=True) for run in ("whole", "resumed"))
    swarm = whole["optimizer_states"][0]["state"]["swarm"]
    assert swarm["particles"].shape[:2] == (1, 8)
    assert len(swarm["generators"]) == 2
    for part in ("state_dict", "optimizer_states"):
        assert_same(resumed[part], whole[part], part)
