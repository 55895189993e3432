"""Objects that group settings, and the arguments of version 0.0."""

import math

import pytest
import torch
from torch import nn

from lit_methods.optim import CBO, AdamCBO, ConsensusBasedSampling, ConsensusHopping, MemoryCBO, PolarizedCBO
from lit_methods.optim.cbo import EffectiveSampleSize, Growing, InitialCloud, ParticleBatches


def rosenbrock(particles):
    x = particles["x"]
    return (1 - x[:, 0]) ** 2 + 10 * (x[:, 1] - x[:, 0] ** 2) ** 2


def positions(kind, **arguments) -> torch.Tensor:
    x = nn.Parameter(torch.tensor([0.5, -0.5]))
    optimizer = kind([("x", x)], seed=0, num_particles=12, **arguments)
    for _ in range(4):
        optimizer.step(rosenbrock)
    return optimizer.particles["x"]


@pytest.mark.parametrize(
    ("kind", "former", "new"),
    [
        (CBO, {"particle_batch_size": 4, "update": "partial"}, {"batches": ParticleBatches(4, "partial")}),
        (CBO, {"init_std": 0.3, "init_around_current": True}, {"init": InitialCloud(0.3, around_current=True)}),
        (CBO, {"alpha_growth": 1.5, "alpha": 2.0}, {"alpha": Growing(2.0, 1.5)}),
        (MemoryCBO, {"effective_sample_size": 0.4}, {"alpha": EffectiveSampleSize(0.4)}),
        (ConsensusHopping, {"effective_sample_size": 0.4}, {"alpha": EffectiveSampleSize(0.4)}),
        (AdamCBO, {"init_std": 0.3}, {"init": InitialCloud(0.3)}),
    ],
)
def test_former_arguments_warn_and_mean_the_same(kind, former, new) -> None:
    with pytest.warns(FutureWarning, match=f"{kind.__name__}'s .*{next(iter(former))}.* will go: write"):
        old = positions(kind, **former)
    assert torch.equal(old, positions(kind, **new))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InitialCloud(std=0.0), "std must be > 0 and finite, got 0.0"),
        (lambda: ParticleBatches(0), "size must be an integer >= 1, got 0"),
        (lambda: ParticleBatches(update="half"), "update must be one of 'full', 'partial', got 'half'"),
        (lambda: Growing(1.0, 0.0), "factor must be > 0 and finite, got 0.0"),
        (lambda: EffectiveSampleSize(1.0), r"share must be in \(0, 1\), got 1.0"),
    ],
)
def test_settings_refuse_bad_values_by_name(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [AdamCBO, ConsensusBasedSampling, MemoryCBO, PolarizedCBO, ConsensusHopping])
def test_kin_refuse_what_they_do_not_use(kind) -> None:
    for name, value in {"stall_tol": 1.0, "gradient_drift": 1.0, "batches": ParticleBatches(5)}.items():
        with pytest.raises(TypeError, match=name):
            kind([nn.Parameter(torch.zeros(2))], **{name: value})
    if kind in (ConsensusBasedSampling, ConsensusHopping):
        with pytest.raises(TypeError, match="lambda_"):
            kind([nn.Parameter(torch.zeros(2))], lambda_=7)


@pytest.mark.parametrize("kind", [CBO, AdamCBO, ConsensusBasedSampling, MemoryCBO, PolarizedCBO])
@pytest.mark.parametrize("name", ["lr", "alpha"])
def test_what_must_be_a_number_is_one(kind, name) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        kind([nn.Parameter(torch.zeros(2))], **{name: math.nan})
