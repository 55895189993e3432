"""Several independent swarms in one array."""

import io
import math

import pytest
import torch
from torch import Tensor, nn

from lit_methods.optim import (
    CBO,
    AdamCBO,
    ConsensusBasedSampling,
    ConsensusHopping,
    MemoryCBO,
    PolarizedCBO,
    particle_losses,
)
from lit_methods.optim.cbo import EffectiveSampleSize, ParticleBatches

RUNS, N, D = 3, 8, 2
VARIANTS = {
    "batches": (CBO, {"batches": ParticleBatches(4)}),
    "partial": (CBO, {"batches": ParticleBatches(4, "partial")}),
    "isotropic": (CBO, {"batches": ParticleBatches(None), "noise": "isotropic", "alpha": EffectiveSampleSize(0.4)}),
    "drift": (CBO, {"batches": ParticleBatches(None), "gradient_drift": 0.5}),
    "stalling": (CBO, {"batches": ParticleBatches(None), "stall_tol": 10.0}),
    "hopping": (ConsensusHopping, {"lr": 0.7}),
    "sampling": (ConsensusBasedSampling, {}),
    "memory": (MemoryCBO, {}),
    "polarized": (PolarizedCBO, {"alpha": 2.0}),
    "adam": (AdamCBO, {}),
}


def bowl(particles: dict[str, Tensor]) -> Tensor:
    return particles["x"].square().sum(-1) + particles["x"].cos().sum(-1)


def build(kind: type = CBO, **arguments) -> tuple[nn.Parameter, CBO | ConsensusHopping]:
    x = nn.Parameter(torch.ones(D, dtype=torch.float64))
    return x, kind([("x", x)], num_particles=N, seed=0, **arguments)


@pytest.mark.parametrize("name", VARIANTS)
def test_runs_equal_swarms_of_their_own_given_the_same_noise(name, monkeypatch) -> None:
    kind, arguments = VARIANTS[name]
    draws = torch.randn(100, RUNS, N, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def train(runs: slice) -> tuple[nn.Parameter, CBO | ConsensusHopping, list[float]]:
        noise, number = iter(draws[:, runs]), runs.stop - runs.start

        def fill(self, x: Tensor, mean: float, std: float) -> None:
            x.copy_(mean + std * next(noise)[:, : len(x) // number, : x.shape[1]].flatten(0, 1))

        monkeypatch.setattr(kind, "fill_normal", fill)
        x, optimizer = build(kind, num_runs=number, **arguments)
        return x, optimizer, [optimizer.step(bowl) for _ in range(6)]

    x, together, lows = train(slice(0, RUNS))
    assert together.particles["x"].shape == (RUNS * N, D)
    alone = [train(slice(run, run + 1)) for run in range(RUNS)]
    leader = min(range(RUNS), key=lambda run: alone[run][2][-1])
    torch.testing.assert_close(torch.tensor(lows), torch.tensor([run[2] for run in alone]).amin(0))
    torch.testing.assert_close(x.detach(), alone[leader][0].detach())
    torch.testing.assert_close(together.consensus()["x"], alone[leader][0].detach())
    torch.testing.assert_close(together.consensus_of_runs()["x"], torch.stack([run[0].detach() for run in alone]))
    torch.testing.assert_close(together.particles["x"], torch.cat([run[1].particles["x"] for run in alone]))
    torch.testing.assert_close(together.best_losses(), torch.cat([run[1].best_losses() for run in alone]))
    torch.testing.assert_close(together.variance(), torch.stack([run[1].variance() for run in alone]).mean(0))
    best = bowl({"x": together.best_particle()["x"][None]})
    torch.testing.assert_close(best, together.best_losses().amin(0, keepdim=True))


def test_any_batched_closure_serves_all_runs() -> None:
    torch.manual_seed(0)
    module, batch = nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
    optimizer = CBO(module, num_particles=10, batches=ParticleBatches(5), num_runs=4, seed=0)
    rows = []

    def losses(particles: dict[str, Tensor]) -> Tensor:
        rows.append(len(particles["weight"]))
        return particle_losses(module, nn.functional.cross_entropy, batch, chunk_size=7)(particles)

    before = optimizer.step(losses)
    for _ in range(30):
        after = optimizer.step(losses)
    assert set(rows) == {20}
    assert after < before
    assert optimizer.consensus_of_runs()["weight"].shape == (4, 2, 3)
    assert len(optimizer.best_losses().unique()) == 4, "runs must differ"


def test_only_stalled_runs_are_shaken() -> None:
    _, optimizer = build(batches=ParticleBatches(None), num_runs=2, stall_tol=1e-5)
    start = torch.zeros(2, N, D, dtype=torch.float64)
    start[1, :, 0] = torch.arange(N)
    optimizer.particles["x"].copy_(start.flatten(0, 1))
    optimizer.state["swarm"]["consensus"].zero_()
    optimizer.step(lambda p: p["x"].sum(-1) * 0)
    still, moving = optimizer.particles["x"].view(2, N, D)
    assert (still != 0).all()
    assert (moving[:, 1] == 0).all(), "the second run's mean moved, so that nothing shakes its idle coordinate"


@pytest.mark.parametrize("kind", [CBO, ConsensusHopping, ConsensusBasedSampling, MemoryCBO, PolarizedCBO, AdamCBO])
def test_a_run_without_finite_loss_keeps_its_consensus_and_the_others_go_on(kind: type) -> None:
    x, optimizer = build(kind, num_runs=2, **({"batches": ParticleBatches(None)} if kind is CBO else {}))
    optimizer.step(bowl)
    before = optimizer.consensus_of_runs()["x"].clone()
    optimizer.step(lambda p: torch.cat([bowl(p)[:N], bowl(p)[N:] * math.nan]))
    after = optimizer.consensus_of_runs()["x"]
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])
    assert any(torch.equal(x.detach(), point) for point in (after if kind is MemoryCBO else after[:1]))  # it remembers
    assert optimizer.particles["x"].isfinite().all()
    if kind is not MemoryCBO:  # which goes on with the losses that it remembers
        with pytest.warns(RuntimeWarning, match="no particle has a finite loss"):
            optimizer.step(lambda p: bowl(p) * math.nan)


@pytest.mark.parametrize("kind", [CBO, ConsensusHopping, ConsensusBasedSampling, MemoryCBO, PolarizedCBO, AdamCBO])
def test_runs_resume_to_the_bit(kind) -> None:
    x, optimizer = build(kind, num_runs=RUNS)
    for _ in range(3):
        optimizer.step(bowl)
    file = io.BytesIO()
    torch.save([x.detach(), optimizer.state_dict()], file)
    y, resumed = build(kind)
    file.seek(0)
    value, state = torch.load(file, weights_only=True)
    y.data.copy_(value)
    resumed.load_state_dict(state)
    assert resumed.num_runs == RUNS
    for _ in range(3):
        optimizer.step(bowl)
        resumed.step(bowl)
    assert torch.equal(x, y)
    for name in ("particles", "consensus", "best", "best_loss"):
        assert torch.equal(optimizer.state["swarm"][name], resumed.state["swarm"][name])


def test_groups_added_later_and_fewer_particles() -> None:
    _, optimizer = build(batches=ParticleBatches(4), num_runs=2)
    optimizer.step(bowl)
    kept = optimizer.particles["x"].view(2, N, D)[:, :4].clone()
    optimizer.reduce_particles(4)
    torch.testing.assert_close(optimizer.particles["x"], kept.flatten(0, 1))
    optimizer.add_param_group({"params": [("y", nn.Parameter(torch.zeros(3, dtype=torch.float64)))]})
    torch.testing.assert_close(optimizer.particles["x"], kept.flatten(0, 1))
    assert optimizer.particles["y"].shape == (8, 3)
    optimizer.step(lambda p: bowl(p) + p["y"].square().sum(-1))
    assert optimizer.consensus_of_runs()["y"].shape == (2, 3)
