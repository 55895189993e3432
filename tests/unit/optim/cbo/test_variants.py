"""Kin of CBO against their equations, the laws they are made for, and CBO where they reduce to it."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_methods.optim import CBO, AdamCBO, ConsensusBasedSampling, MemoryCBO, PolarizedCBO, particle_losses
from lit_methods.optim.cbo import EffectiveSampleSize, ParticleBatches
from lit_methods.optim.cbo.swarm import ParticleOptimizer

N, D = 7, 3
LR, LAMBDA, SIGMA, ALPHA = 0.2, 1.3, 0.7, 2.0


def swarm(kind: type, points: Tensor, seed: int = 0, **arguments) -> tuple[nn.Parameter, CBO]:
    x = nn.Parameter(torch.zeros(points.shape[1], dtype=points.dtype))
    optimizer = kind([("x", x)], num_particles=len(points), seed=seed, **arguments)
    optimizer.particles["x"].copy_(points)
    _ = optimizer.particles  # what depends on the first particles
    if "memory" in optimizer.state["swarm"]:
        optimizer.state["swarm"]["memory"][0].copy_(points)
    return x, optimizer


def bowl(particles: dict[str, Tensor]) -> Tensor:
    return particles["x"].square().sum(-1) + particles["x"][:, 0].cos()


def start(n: int = N) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def drawn(monkeypatch) -> list[np.ndarray]:
    """The standard normal numbers that were drawn, in order."""
    record: list[np.ndarray] = []
    generator = torch.Generator().manual_seed(5)

    def fill(self, x: Tensor, mean: float, std: float) -> None:
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        record.append(z.numpy())
        x.copy_(mean + std * z)

    monkeypatch.setattr(ParticleOptimizer, "fill_normal", fill)
    return record


def trajectory(optimizer: CBO, drawn: list[np.ndarray], steps: int = 3) -> Iterator[tuple[np.ndarray, ...]]:
    """Before and after each step: particles, their losses, the noise, particles, the parameters."""
    for _ in range(steps):
        drawn.clear()
        before = optimizer.particles["x"].clone()
        optimizer.step(bowl)
        after = optimizer.particles["x"].numpy().copy()
        yield before.numpy(), bowl({"x": before}).numpy(), drawn, after, optimizer.consensus()["x"].numpy().copy()


def softmin(losses: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    w = np.exp(-alpha * losses)
    return w / w.sum(-1, keepdims=True)


def test_sampling_follows_its_equation(drawn) -> None:
    for mode, heat in (("sampling", 1 + ALPHA), ("optimization", 1.0)):
        _, optimizer = swarm(ConsensusBasedSampling, start(), lr=LR, alpha=ALPHA, mode=mode)
        for v, losses, (z,), after, found in trajectory(optimizer, drawn):
            w = softmin(losses)
            m = w @ v
            noise = z @ (np.sqrt(w)[:, None] * (v - m))
            expected = m + np.exp(-LR) * (v - m) + np.sqrt((1 - np.exp(-2 * LR)) * heat) * noise
            np.testing.assert_allclose(after, expected, rtol=1e-10)
            np.testing.assert_allclose(found, m, rtol=1e-10)


def test_noise_of_sampling_has_the_weighted_covariance() -> None:
    v = start(40)
    w = torch.softmax(-ALPHA * bowl({"x": v}), 0)
    away = v - w @ v
    covariance = (1 + ALPHA) * away.T @ (w[:, None] * away)
    moves = []
    for seed in range(500):
        # so long a step forgets the places
        _, optimizer = swarm(ConsensusBasedSampling, v, seed=seed, lr=50.0, alpha=ALPHA)
        optimizer.step(bowl)
        moves.append(optimizer.particles["x"] - w @ v)
    found = torch.cat(moves).T.cov(correction=0)
    torch.testing.assert_close(found, covariance, rtol=0, atol=0.03 * float(covariance.diagonal().max()))


@pytest.mark.parametrize(("alpha", "lr"), [(0.5, 0.3), (3.0, 2.0)])
def test_sampling_has_the_law_of_a_gaussian_target(alpha, lr) -> None:
    """For any alpha and any step length; CBXpy's Euler step has another law."""
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    covariance = torch.tensor([[2.0, 0.8], [0.8, 0.5]], dtype=torch.float64)
    precision = covariance.inverse()

    def energy(p: dict[str, Tensor]) -> Tensor:
        away = p["x"] - mean
        return 0.5 * ((away @ precision) * away).sum(-1)

    points = 3 * torch.randn(1500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, optimizer = swarm(ConsensusBasedSampling, points, lr=lr, alpha=alpha)
    samples = []
    for step in range(120):
        optimizer.step(energy)
        if step >= 40:
            samples.append(optimizer.particles["x"].clone())
    found = torch.cat(samples)
    torch.testing.assert_close(found.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(found.T.cov(), covariance, rtol=0.1, atol=0.02)


def test_sampling_in_the_other_mode_optimizes_and_takes_sample_sizes() -> None:
    x, optimizer = swarm(
        ConsensusBasedSampling, start(60) * 3, lr=0.5, mode="optimization", alpha=EffectiveSampleSize(0.5)
    )
    for _ in range(60):
        optimizer.step(lambda p: (p["x"] - 1).square().sum(-1))
    torch.testing.assert_close(x.detach(), torch.ones(D, dtype=torch.float64), rtol=0, atol=1e-4)
    assert optimizer.spread() < 1e-6


def test_memory_follows_its_equation(drawn) -> None:
    settings = {"lr": LR, "lambda_": LAMBDA, "sigma": SIGMA, "alpha": ALPHA, "lambda_memory": 0.6}
    for sigma_memory, used in ((None, 0.6 * SIGMA), (0.9, 0.9)):
        _, optimizer = swarm(MemoryCBO, start(), sigma_memory=sigma_memory, **settings)
        best = np.full(N, np.inf)
        y = np.zeros((N, D))
        for v, losses, (z1, z2), after, found in trajectory(optimizer, drawn, 6):
            y[losses < best], best = v[losses < best], np.minimum(losses, best)
            m = softmin(best) @ y
            drift = LAMBDA * LR * (v - m) + 0.6 * LR * (v - y)
            expected = v - drift + np.sqrt(LR) * (SIGMA * (v - m) * z1 + used * (v - y) * z2)
            np.testing.assert_allclose(after, expected, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(found, m, rtol=1e-10)


def test_remembered_losses_never_rise_and_are_those_of_the_memory() -> None:
    _, optimizer = swarm(MemoryCBO, start(20), sigma=1.5)
    remembered, lows = torch.full((1, 20), math.inf, dtype=torch.float64), []
    for _ in range(25):
        lows.append(optimizer.step(bowl))
        state = optimizer.state["swarm"]
        assert (state["memory_losses"] <= remembered).all()
        remembered = state["memory_losses"].clone()
        torch.testing.assert_close(bowl({"x": state["memory"][0]}), remembered[0])
    assert lows == sorted(lows, reverse=True)
    assert lows[-1] == optimizer.best_losses()[0]


def test_polarized_follows_its_equation(drawn) -> None:
    kappa = 0.8
    settings = {"lr": LR, "lambda_": LAMBDA, "sigma": SIGMA, "alpha": ALPHA, "kappa": kappa}
    for noise in ("anisotropic", "isotropic"):
        _, optimizer = swarm(PolarizedCBO, start(), noise=noise, **settings)
        for v, losses, (z,), after, found in trajectory(optimizer, drawn):
            squares = ((v[:, None] - v[None]) ** 2).sum(-1)
            w = np.exp(-squares / (2 * kappa**2) - ALPHA * losses)
            m = w @ v / w.sum(1, keepdims=True)
            away = v - m
            scale = away if noise == "anisotropic" else np.linalg.norm(away, axis=1, keepdims=True)
            np.testing.assert_allclose(after, v - LAMBDA * LR * away + SIGMA * np.sqrt(LR) * scale * z, rtol=1e-8)
            np.testing.assert_allclose(found, m[losses.argmin()], rtol=1e-8)


def test_polarized_finds_both_minima_and_cbo_one() -> None:
    def wells(p: dict[str, Tensor]) -> Tensor:
        return (p["x"][:, 0].square() - 1).square() + p["x"][:, 1:].square().sum(-1)

    ends = {}
    for kind, more in ((PolarizedCBO, {"kappa": 0.3}), (CBO, {"batches": ParticleBatches(None), "stall_tol": 0.0})):
        _, optimizer = swarm(kind, start(200) * 1.5, alpha=30.0, **more)
        for _ in range(200):
            optimizer.step(wells)
        near = [(optimizer.particles["x"] - torch.tensor([side, 0.0, 0.0])).norm(dim=1) < 0.3 for side in (-1.0, 1.0)]
        ends[kind] = sorted(int(x.sum()) for x in near)
    assert ends[CBO] == [0, 200]
    assert ends[PolarizedCBO][0] >= 30
    assert sum(ends[PolarizedCBO]) >= 180


def test_polarized_that_sees_everything_is_cbo() -> None:
    runs = []
    for kind, more in (
        (PolarizedCBO, {"kappa": math.inf}),
        (CBO, {"batches": ParticleBatches(None), "stall_tol": 0.0}),
    ):
        x, optimizer = swarm(kind, start(), alpha=ALPHA, **more)
        for _ in range(5):
            optimizer.step(bowl)
        runs.append((x.detach(), optimizer.particles["x"]))
    torch.testing.assert_close(*runs)


def test_particles_without_finite_loss_draw_nobody() -> None:
    _, optimizer = swarm(PolarizedCBO, start(), sigma=0.0, kappa=5.0)
    optimizer.step(lambda p: bowl(p).where(p["x"][:, 0] < 0, math.nan))
    assert optimizer.particles["x"].isfinite().all()
    with pytest.warns(RuntimeWarning, match="no particle has a finite loss"):
        optimizer.step(lambda p: bowl(p) * math.nan)


def test_adam_follows_its_equation(drawn) -> None:
    b1, b2, eps = 0.8, 0.95, 1e-3
    settings = {"lr": LR, "lambda_": LAMBDA, "sigma": SIGMA, "alpha": ALPHA, "betas": (b1, b2), "eps": eps}
    _, optimizer = swarm(AdamCBO, start(), **settings)
    p, q = np.zeros((N, D)), np.zeros((N, D))
    for k, (v, losses, (z,), after, found) in enumerate(trajectory(optimizer, drawn, 5), 1):
        m = softmin(losses) @ v
        p, q = b1 * p + (1 - b1) * (v - m), b2 * q + (1 - b2) * (v - m) ** 2
        drift = (p / (1 - b1**k)) / (np.sqrt(q / (1 - b2**k)) + eps)
        expected = v - LAMBDA * LR * drift + SIGMA * np.sqrt(LR) * (v - m) * z
        np.testing.assert_allclose(after, expected, rtol=1e-10)
        np.testing.assert_allclose(found, m, rtol=1e-10)


@pytest.mark.parametrize("kind", [ConsensusBasedSampling, MemoryCBO, PolarizedCBO, AdamCBO])
def test_fewer_particles_and_new_groups(kind) -> None:
    _, optimizer = swarm(kind, start())
    optimizer.step(bowl)
    kept = optimizer.particles["x"][:4].clone()
    optimizer.reduce_particles(4)
    optimizer.add_param_group({"params": [("y", nn.Parameter(torch.zeros(2, dtype=torch.float64)))]})
    assert torch.equal(optimizer.particles["x"], kept)
    optimizer.step(lambda p: bowl(p) + p["y"].square().sum(-1))
    sizes = {value.shape for value in optimizer.state["swarm"].values() if torch.is_tensor(value) and value.ndim == 3}
    assert sizes == {(1, 4, D + 2)}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (ConsensusBasedSampling, {"mode": "optimization", "num_particles": 200, "alpha": EffectiveSampleSize(0.3)}),
        (MemoryCBO, {}),
        (PolarizedCBO, {"kappa": 20.0}),
        (AdamCBO, {}),
    ],
)
def test_trains_a_network_with_losses_that_have_no_gradient(kind, more) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    y = (x[:, 0] > 0.3 * x[:, 1]).long()
    module = nn.Linear(2, 2)
    optimizer = kind(module, seed=0, **more)
    for _ in range(60):
        optimizer.step(particle_losses(module, lambda out, y: (out.argmax(1) != y).float().mean(), (x, y)))
    assert (module(x).argmax(1) == y).float().mean() > 0.95
