import copy
import io
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call

from lit_methods.optim import CBO, ConsensusBasedSampling, ConsensusHopping, particle_losses
from lit_methods.optim.cbo import AdamCBO, EffectiveSampleSize, Growing, InitialCloud, MemoryCBO, ParticleBatches
from lit_methods.optim.cbo.consensus import alpha_for_sample_size, consensus_weights, weighted_mean


def swarm(points: Tensor, **arguments) -> tuple[nn.Parameter, CBO]:
    """A CBO over one vector, without mini-batches, whose particles are ``points`` (N, d)."""
    x = nn.Parameter(torch.zeros(points.shape[1], dtype=points.dtype))
    given = {"num_particles": len(points), "batches": ParticleBatches(None), "stall_tol": 0.0, "seed": 0, **arguments}
    optimizer = CBO([("x", x)], **given)
    optimizer.particles["x"].copy_(points)
    return x, optimizer


def quadratic(particles: dict[str, Tensor]) -> Tensor:
    return 0.5 * particles["x"].square().sum(-1)


def points(n: int = 12, d: int = 3) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# --- the consensus point ----------------------------------------------------------------------------------------------


def test_alpha_zero_is_the_mean_and_infinity_the_best_particle() -> None:
    v = points()
    for alpha, expected in ((0.0, v.mean(0)), (math.inf, v[quadratic({"x": v}).argmin()])):
        x, optimizer = swarm(v, alpha=alpha)
        optimizer.step(quadratic)
        torch.testing.assert_close(x.detach(), expected)
        torch.testing.assert_close(optimizer.consensus()["x"], expected)


def test_weights_equal_the_definition_and_survive_any_alpha() -> None:
    losses = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(
        consensus_weights(losses, 0.7), torch.exp(-0.7 * losses) / torch.exp(-0.7 * losses).sum()
    )
    huge = 1e6 + torch.tensor([0.25, 0.0, 0.25])
    for alpha in (1e15, 1e38, 1e300, math.inf):
        assert consensus_weights(huge, alpha).tolist() == [0.0, 1.0, 0.0]
    assert consensus_weights(torch.tensor([1.0, 1.0, 5.0]), math.inf).tolist() == [0.5, 0.5, 0.0]


def test_losses_that_are_not_finite_have_no_weight() -> None:
    v = points(5)
    losses = torch.tensor([math.nan, 1.0, math.inf, 2.0, -math.inf], dtype=torch.float64)
    for alpha, expected in ((0.0, (v[1] + v[3]) / 2), (math.inf, v[1])):
        x, optimizer = swarm(v, alpha=alpha)
        assert optimizer.step(lambda p: losses) == 1
        torch.testing.assert_close(x.detach(), expected)


def test_effective_sample_size_sets_alpha() -> None:
    losses = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for share in (0.1, 0.5, 0.9):
        weights = consensus_weights(losses, alpha_for_sample_size(losses, share))
        assert 1 / weights.square().sum() == pytest.approx(share * 50, rel=1e-3)
    v = points()
    x, optimizer = swarm(v, alpha=EffectiveSampleSize(0.5))
    optimizer.step(quadratic)
    weights = consensus_weights(quadratic({"x": v}), alpha_for_sample_size(quadratic({"x": v}), 0.5))
    torch.testing.assert_close(x.detach(), weights @ v)


def test_consensus_lies_in_the_convex_hull() -> None:
    for alpha in (0.0, 1.0, 1e3, 1e15):
        x, optimizer = swarm(points(), alpha=alpha)
        before = optimizer.particles["x"].clone()
        optimizer.step(quadratic)
        assert (x >= before.amin(0) - 1e-12).all()
        assert (x <= before.amax(0) + 1e-12).all()


# --- the step ---------------------------------------------------------------------------------------------------------


def test_one_step_equals_the_formula_for_both_noises(monkeypatch) -> None:
    v, lr, lambda_, sigma = points(), 0.1, 1.3, 0.7
    draws = torch.randn(v.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights = torch.softmax(-2.0 * quadratic({"x": v}), 0)
    distance = v - weights @ v
    monkeypatch.setattr(CBO, "fill_normal", lambda self, x, mean, std: x.copy_(mean + std * draws))
    for noise, scale in (("anisotropic", distance), ("isotropic", distance.norm(dim=1, keepdim=True))):
        _, optimizer = swarm(v, lr=lr, lambda_=lambda_, sigma=sigma, alpha=2.0, noise=noise)
        optimizer.particles["x"].copy_(v)
        loss = optimizer.step(quadratic)
        expected = v - lambda_ * lr * distance + sigma * lr**0.5 * scale * draws
        torch.testing.assert_close(optimizer.particles["x"], expected)
        assert loss == quadratic({"x": v}).min()


def test_noise_has_the_stated_variance() -> None:
    v = torch.ones(40_000, 2, dtype=torch.float64) * torch.tensor([2.0, -0.5], dtype=torch.float64)
    v[0] = 0  # the best particle, and with alpha infinite the consensus
    lr, sigma = 0.04, 1.5
    for noise, scale in (("anisotropic", v[1].abs()), ("isotropic", v[1].norm().expand(2))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, optimizer = swarm(v, lr=lr, sigma=sigma, alpha=math.inf, noise=noise)
        optimizer.step(quadratic)
        moved = optimizer.particles["x"][1:]
        torch.testing.assert_close(moved.mean(0), (1 - lr) * v[1], atol=0.02, rtol=0)
        torch.testing.assert_close(moved.var(0), sigma**2 * lr * scale**2, rtol=0.05, atol=0)


def test_without_noise_and_memory_all_particles_jump_to_the_consensus() -> None:
    for noise in ("anisotropic", "isotropic"):
        x, optimizer = swarm(points(), lr=0.5, lambda_=2.0, sigma=0.0, noise=noise)
        optimizer.step(quadratic)
        torch.testing.assert_close(optimizer.particles["x"], x.detach().expand(12, 3), rtol=0, atol=1e-15)


def test_identical_particles_stay_put() -> None:
    v = points(1).expand(8, 3).clone()
    _, optimizer = swarm(v)
    for _ in range(20):
        optimizer.step(quadratic)
    torch.testing.assert_close(optimizer.particles["x"], v)


def test_a_single_particle_never_moves_and_says_so() -> None:
    v = points(1)
    with pytest.warns(UserWarning, match="num_particles=1"):
        _, optimizer = swarm(v)
    for _ in range(5):
        optimizer.step(quadratic)
    torch.testing.assert_close(optimizer.particles["x"], v, rtol=0, atol=0)


def test_a_constant_added_to_the_loss_changes_nothing() -> None:
    first, second = swarm(points())[1], swarm(points())[1]
    for _ in range(10):
        first.step(quadratic)
        second.step(lambda p: quadratic(p) + 17.0)
    torch.testing.assert_close(first.particles, second.particles)


def test_translations_and_permutations_commute_with_steps(monkeypatch) -> None:
    v, shift = points(), torch.tensor([5.0, -3.0, 1.0], dtype=torch.float64)
    order = torch.randperm(len(v), generator=torch.Generator().manual_seed(1))
    draws = torch.randn(10, *v.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def run(start: Tensor, origin: Tensor, rows: Tensor) -> Tensor:
        noise = iter(draws[:, rows])
        _, optimizer = swarm(start)
        with monkeypatch.context() as patch:
            patch.setattr(CBO, "fill_normal", lambda self, x, mean, std: x.copy_(mean + std * next(noise)))
            for _ in range(10):
                optimizer.step(lambda p: quadratic({"x": p["x"] - origin}))
        return optimizer.particles["x"]

    zero, same = torch.zeros(3, dtype=torch.float64), torch.arange(len(v))
    plain = run(v, zero, same)
    torch.testing.assert_close(run(v + shift, shift, same), plain + shift)
    torch.testing.assert_close(run(v[order], zero, order), plain[order])


def test_particle_batches_move_all_or_their_own() -> None:
    v, seen = points(), []

    def losses(particles: dict[str, Tensor]) -> Tensor:
        seen.append(particles["x"].clone())
        return quadratic(particles)

    for update, moves in (("full", 12), ("partial", 4)):
        seen.clear()
        _, optimizer = swarm(v, batches=ParticleBatches(4, update), sigma=0.0)
        optimizer.step(losses)
        assert [len(batch) for batch in seen] == [4, 4, 4]
        first = seen[0]
        assert (first[:, None] == v).all(-1).any(1).all(), "the first batch is some of the particles"
        unmoved = [(row == v).all(1).any().item() for batch in seen[1:] for row in batch]
        assert not any(unmoved) if moves == 12 else all(unmoved)
    rows = torch.cat(seen)  # partial: each particle exactly once
    assert sorted(rows[:, 0].tolist()) == sorted(v[:, 0].tolist())


def test_a_stalled_consensus_shakes_all_particles() -> None:
    v = torch.zeros(4000, 2, dtype=torch.float64)
    _, optimizer = swarm(v, stall_tol=1e-5, lr=0.25, sigma=0.8)
    optimizer.step(quadratic)
    torch.testing.assert_close(optimizer.particles["x"].std(0), torch.full((2,), 0.4).double(), rtol=0.05, atol=0)
    _, optimizer = swarm(v, stall_tol=0.0, lr=0.25, sigma=0.8)
    optimizer.step(quadratic)
    assert not optimizer.particles["x"].any()


def test_gradient_drift_by_autograd_and_by_differences() -> None:
    v = points()
    plain = swarm(v, sigma=0.3)[1]
    plain.step(quadratic)
    expected = plain.particles["x"] * (1 - 2.0 * 0.1)  # the gradient at the place reached is the place
    for losses in (quadratic, lambda p: quadratic({"x": p["x"].detach()})):
        _, drifting = swarm(v, sigma=0.3, gradient_drift=2.0)
        drifting.step(losses)
        torch.testing.assert_close(drifting.particles["x"], expected, rtol=1e-8, atol=1e-8)


def test_alpha_grows_after_every_step_and_goes_on_from_a_checkpoint() -> None:
    _, optimizer = swarm(points(), alpha=Growing(2.0, 1.05))
    for k in range(3):
        assert optimizer.param_groups[0]["alpha"] == pytest.approx(2.0 * 1.05**k)
        before = optimizer.particles["x"].clone()
        weights = torch.softmax(-2.0 * 1.05**k * quadratic({"x": before}), 0)
        optimizer.step(quadratic)
        torch.testing.assert_close(optimizer.consensus()["x"], weights @ before)
    _, resumed = swarm(points())
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step(quadratic)
    assert resumed.param_groups[0]["alpha"] == pytest.approx(2.0 * 1.05**4)


def test_groups_have_rates_of_their_own() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    optimizer = CBO([{"params": [("a", a)]}, {"params": [("b", b)], "lr": 0.0}], batches=ParticleBatches(None))
    before = {name: value.clone() for name, value in optimizer.particles.items()}
    optimizer.step(lambda p: p["a"].square().sum(-1) + p["b"].square().sum(-1))
    assert torch.equal(optimizer.particles["b"], before["b"])
    assert (optimizer.particles["a"] != before["a"]).any()


def test_the_best_particle_is_kept() -> None:
    _, optimizer = swarm(points())
    assert optimizer.best_particle()["x"].isnan().all()
    losses = [optimizer.step(quadratic) for _ in range(15)]
    assert quadratic({"x": optimizer.best_particle()["x"][None]}) == min(losses)


def test_fewer_particles() -> None:
    _, optimizer = swarm(points(), batches=ParticleBatches(4))
    optimizer.step(quadratic)
    kept = optimizer.particles["x"][:8].clone()
    optimizer.reduce_particles(8)
    assert torch.equal(optimizer.particles["x"], kept)
    assert optimizer.num_particles == 8
    optimizer.step(quadratic)
    torch.testing.assert_close(optimizer.variance(), optimizer.particles["x"].var(0, correction=0))
    with pytest.raises(ValueError, match=r"num_particles must be in \[1, 8\], got 9"):
        optimizer.reduce_particles(9)


# --- the link to gradient descent -------------------------------------------------------------------------------------


def test_consensus_hopping_is_a_gradient_step() -> None:
    """Quadratic with curvatures 1 and 4 at (1, 1), alpha 1, s 0.1: the Gaussian integral is x / (1 + tau h) exactly."""
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = ConsensusHopping([("x", x)], num_particles=2_000_000, alpha=1.0, width=0.1, seed=0)
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    optimizer.step(lambda p: 0.5 * (curvature * p["x"].square()).sum(-1))
    exact = 1 / (1 + 0.01 * curvature) - 1
    torch.testing.assert_close(x.detach() - 1, exact, rtol=0, atol=4e-4)  # five standard errors
    torch.testing.assert_close(optimizer.implicit_gradient()["x"], curvature, rtol=0.05, atol=0.05)


def test_implicit_gradient_is_the_scaled_move() -> None:
    x, optimizer = swarm(points())
    optimizer.step(quadratic)
    before = x.detach().clone()
    optimizer.step(quadratic)
    torch.testing.assert_close(optimizer.implicit_gradient(0.5)["x"], (before - x.detach()) / 0.5)
    with pytest.raises(ValueError, match="tau must be"):
        optimizer.implicit_gradient(0.0)


def test_hopping_width_vanishes_on_schedule() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = ConsensusHopping([("x", x)], num_particles=10, width=1.0, width_decay=0.98, width_decay_every=3)
    for _ in range(7):
        optimizer.step(quadratic)
    assert optimizer.param_groups[0]["width"] == pytest.approx(0.98**2)


@pytest.mark.parametrize("kind", [ConsensusHopping, ConsensusBasedSampling])
def test_two_particles_are_the_least(kind) -> None:
    kind([nn.Parameter(torch.zeros(2))], num_particles=2)
    with pytest.raises(ValueError, match="num_particles must be >= 2, got 1"):
        kind([nn.Parameter(torch.zeros(2))], num_particles=1)


def test_hopping_goes_no_further_than_the_consensus() -> None:
    ConsensusHopping([nn.Parameter(torch.zeros(2))], lr=1.0, width_decay=1.0)
    for bad in ({"lr": 1.1}, {"width_decay": 1.1}, {"width_decay": 0.0}, {"width_decay_every": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ConsensusHopping([nn.Parameter(torch.zeros(2))], **bad)


def test_hopping_part_of_the_way() -> None:
    whole, half = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    for x, lr in ((whole, 1.0), (half, 0.5)):
        ConsensusHopping([("x", x)], lr=lr, num_particles=20, width=0.3, seed=1).step(quadratic)
    torch.testing.assert_close(half.detach() - 1, 0.5 * (whole.detach() - 1))


# --- networks ---------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.frozen = nn.Linear(3, 2)
        self.frozen.requires_grad_(False)
        self.register_buffer("offset", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.decoder(torch.relu(self.encoder(x + self.offset))))


def test_particle_losses_equal_a_loop_for_tied_frozen_and_buffered_modules() -> None:
    torch.manual_seed(0)
    module, batch = Tied(), (torch.randn(7, 3), torch.randn(7, 2))
    optimizer = CBO(module, num_particles=6, batches=ParticleBatches(None))
    particles = optimizer.particles
    assert {name: tuple(value.shape) for name, value in particles.items()} == {"encoder.weight": (6, 3, 3)}
    expected = []
    for weight in particles["encoder.weight"]:
        out = functional_call(module, {"encoder.weight": weight}, (batch[0],))
        expected.append(nn.functional.mse_loss(out, batch[1]))
    for chunk_size in (None, 1, 4):
        losses = particle_losses(module, nn.MSELoss(), batch, chunk_size)(particles)
        torch.testing.assert_close(losses, torch.stack(expected))
    frozen = copy.deepcopy(module.frozen.state_dict())
    optimizer.step(particle_losses(module, nn.MSELoss(), batch))
    torch.testing.assert_close(module.encoder.weight, optimizer.consensus()["encoder.weight"])
    assert module.decoder.weight is module.encoder.weight
    torch.testing.assert_close(module.frozen.state_dict(), frozen, rtol=0, atol=0)


def test_batch_normalisation_takes_batch_statistics_and_leaves_running_ones() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    batch = torch.randn(16, 3), torch.randint(2, (16,))
    before = copy.deepcopy(dict(module.named_buffers()))
    optimizer = CBO(module, num_particles=5, batches=ParticleBatches(None))
    losses = particle_losses(module, nn.CrossEntropyLoss(), batch)(optimizer.particles)
    torch.testing.assert_close(dict(module.named_buffers()), before, rtol=0, atol=0)
    for i, loss in enumerate(losses):
        alone = copy.deepcopy(module)
        alone.load_state_dict({name: value[i] for name, value in optimizer.particles.items()}, strict=False)
        torch.testing.assert_close(nn.functional.cross_entropy(alone(batch[0]), batch[1]), loss.detach())
    module.eval()
    particle_losses(module, nn.CrossEntropyLoss(), batch)(optimizer.particles)


def test_dropout_differs_between_particles() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 1))
    weight = torch.ones(8, 1, 20)
    losses = particle_losses(module, lambda out, y: (out - y).sum(), (torch.ones(1, 20), torch.zeros(1, 1)))
    assert losses({"1.weight": weight, "1.bias": torch.zeros(8, 1)}).unique().numel() > 1


def test_trains_a_network_with_losses_that_have_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    y = (x[:, 0] > 0.3 * x[:, 1]).long()
    module = nn.Linear(2, 2)
    optimizer = CBO(module, seed=0)
    for _ in range(20):
        optimizer.step(particle_losses(module, lambda out, y: (out.argmax(1) != y).float().mean(), (x, y)))
    assert (module(x).argmax(1) == y).float().mean() > 0.95


def test_names_that_the_module_does_not_know_are_refused() -> None:
    module = nn.Linear(2, 2)
    optimizer = CBO(module.parameters())
    assert list(optimizer.particles) == ["0", "1"]
    with pytest.raises(ValueError, match=r"no parameters \['0', '1'\].*named_parameters"):
        optimizer.step(particle_losses(module, nn.MSELoss(), (torch.ones(1, 2), torch.ones(1, 2))))


def test_bfloat16_losses_and_parameters_keep_float32_particles() -> None:
    module = nn.Linear(4, 2, dtype=torch.bfloat16)
    batch = torch.randn(8, 4, dtype=torch.bfloat16), torch.randn(8, 2, dtype=torch.bfloat16)
    optimizer = CBO(module, num_particles=20, seed=0)
    closure = particle_losses(module, nn.MSELoss(), batch)
    optimizer.step(lambda p: closure({name: value.bfloat16() for name, value in p.items()}))
    assert optimizer.consensus()["weight"].dtype == torch.float32
    torch.testing.assert_close(module.weight.detach(), optimizer.consensus()["weight"].bfloat16(), rtol=0, atol=0)


def test_consensus_is_float32_under_autocast() -> None:
    v = points(64).float()
    results = []
    for enabled in (False, True):
        x, optimizer = swarm(v)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.step(quadratic)
        results.append(x.detach())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


# --- closures ---------------------------------------------------------------------------------------------------------


def test_the_scalar_closure_gives_the_same_run_as_the_batched_one() -> None:
    torch.manual_seed(0)
    batch = torch.randn(9, 3), torch.randn(9, 2)
    modules = [nn.Linear(3, 2).double() for _ in range(3)]
    batch = batch[0].double(), batch[1].double()
    loss = nn.MSELoss()
    optimizers = [CBO(m, num_particles=12, batches=ParticleBatches(4), seed=5) for m in modules]

    def scalar() -> Tensor:
        value = loss(modules[0](batch[0]), batch[1])
        value.backward()
        return value

    for _ in range(4):
        optimizers[0].step(scalar)
        optimizers[1].step(particle_losses(modules[1], loss, batch))
        optimizers[2].step(lambda: particle_losses(modules[2], loss, batch))
    for module in modules[1:]:
        torch.testing.assert_close(module.state_dict(), modules[0].state_dict(), rtol=1e-10, atol=1e-10)


def test_lightning_automatic_optimization_works_unchanged() -> None:
    class Regression(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

        def configure_optimizers(self):
            return CBO(self.parameters(), num_particles=40, batches=ParticleBatches(None), seed=0)

    torch.manual_seed(0)
    x = torch.randn(32, 2)
    data = torch.utils.data.TensorDataset(x, x @ torch.tensor([[1.0], [-2.0]]) + 0.5)
    module = Regression()
    before = nn.functional.mse_loss(module.layer(data.tensors[0]), data.tensors[1])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=60, enable_checkpointing=False, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=32))
    assert trainer.global_step == 60
    assert nn.functional.mse_loss(module.layer(data.tensors[0]), data.tensors[1]) < 0.1 * before


def test_a_closure_without_result_does_nothing() -> None:
    _, optimizer = swarm(points())
    before = optimizer.particles["x"].clone()
    assert optimizer.step(lambda: None) is None
    assert torch.equal(optimizer.particles["x"], before)
    with pytest.raises(RuntimeError, match=r"needs a closure.*16-mixed"):
        optimizer.step()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_losses_of_the_wrong_shape_are_refused() -> None:
    _, optimizer = swarm(points())
    wrongs = ((lambda p: quadratic(p).sum(), r"\(\)"), (lambda p: p["x"], r"\(12, 3\)"), (lambda p: 1.0, "float"))
    for wrong, got in wrongs:
        with pytest.raises(ValueError, match=rf"one loss per particle, shape \(12,\), got {got}"):
            optimizer.step(wrong)


def test_some_bad_losses_are_ignored_all_bad_ones_skip_the_step() -> None:
    _, optimizer = swarm(points())
    optimizer.step(lambda p: quadratic(p).where(p["x"][:, 0] > 0, math.nan))
    assert optimizer.particles["x"].isfinite().all()
    before = optimizer.consensus()["x"].clone(), optimizer.particles["x"].clone()
    with pytest.warns(RuntimeWarning, match="CBO skipped a step: no particle has a finite loss"):
        optimizer.step(lambda p: quadratic(p) * math.nan)
    assert torch.equal(optimizer.consensus()["x"], before[0])
    assert torch.equal(optimizer.particles["x"], before[1])
    optimizer.step(quadratic)  # the swarm is still usable


@pytest.mark.parametrize("kind", [AdamCBO, ConsensusHopping])
def test_a_skipped_step_is_not_counted(kind) -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = kind([("x", x)], num_particles=4, seed=0)
    optimizer.step(quadratic)
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        optimizer.step(lambda p: quadratic(p) * math.nan)
    assert optimizer.state["swarm"]["steps"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_are_evaluated_in_theirs(dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(32, 4, dtype=dtype), torch.randint(3, (32,))
    optimizer = CBO(model, num_particles=20, alpha=20.0, seed=0)
    losses = particle_losses(model, nn.functional.cross_entropy, (x, y))
    found = losses(optimizer.particles)
    assert found.dtype == torch.float32
    for i in range(2):
        weights = {name: p[i].to(dtype) for name, p in optimizer.particles.items()}
        expected = nn.functional.cross_entropy(functional_call(model, weights, x).float(), y)
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-3)
    first = optimizer.step(losses)
    assert min(optimizer.step(losses) for _ in range(30)) < first
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("dim", [1, 20])
def test_the_consensus_of_a_million_particles_is_exact_to_a_millionth(dim) -> None:
    number = 10**6 + 3
    generator = torch.Generator().manual_seed(0)
    v, losses = torch.randn(1, number, dim, generator=generator) + 1, torch.rand(1, number, generator=generator)
    weights = (-losses.double()).softmax(-1)
    expected = (weights[..., None] * v).sum(1)
    torch.testing.assert_close(weighted_mean(v, consensus_weights(losses, 1.0)).double(), expected, rtol=0.0, atol=1e-6)
    pair = torch.cat([v, 2 * v])  # of two runs
    torch.testing.assert_close(
        weighted_mean(pair, consensus_weights(losses, 1.0).expand(2, -1)).double()[1:], 2 * expected, rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("kind", [CBO, AdamCBO, MemoryCBO, ConsensusHopping])
def test_a_parameter_frozen_between_steps_stays_and_moves_again_when_thawed(kind) -> None:
    a, b, c = (nn.Parameter(torch.full((n,), 2.0)) for n in (2, 3, 1))
    optimizer = kind([("a", a), ("b", b), ("c", c)], num_particles=8, alpha=0.1, seed=0)

    def losses(particles: dict[str, Tensor]) -> Tensor:
        return sum(p.square().sum(-1) for p in particles.values())

    optimizer.step(losses)
    kept = optimizer.particles["a"].clone(), optimizer.particles["c"].clone()
    b.requires_grad_(False)
    frozen, moved = b.clone(), c.clone()
    assert optimizer.particles.keys() == {"a", "c"}
    assert torch.equal(optimizer.particles["a"], kept[0])
    assert torch.equal(optimizer.particles["c"], kept[1])
    optimizer.step(losses)
    assert torch.equal(b, frozen)
    assert not torch.equal(c, moved)
    kept = optimizer.particles["a"].clone(), optimizer.particles["c"].clone()
    b.requires_grad_()
    assert optimizer.particles["b"].shape == (8, 3)
    assert torch.equal(optimizer.particles["a"], kept[0])
    assert torch.equal(optimizer.particles["c"], kept[1])
    torch.testing.assert_close(optimizer.consensus(), {"a": a.detach(), "b": b.detach(), "c": c.detach()})
    for _ in range(2):
        optimizer.step(losses)
    assert not torch.equal(b, frozen)


def test_the_best_loss_falls_below_zero() -> None:
    _, optimizer = swarm(points(), alpha=0.1)
    lowest = [optimizer.step(lambda p, k=k: quadratic(p) - 100 * k) for k in (1, 3, 2)]
    assert lowest[1] < lowest[2] < lowest[0] < 0
    assert float(optimizer.best_losses()) == lowest[1]


def test_closures_of_any_kind_are_told_apart_by_their_arguments() -> None:
    class Problem:
        def losses(self, particles: dict[str, Tensor]) -> Tensor:
            return quadratic(particles)

        def ready(self, losses=quadratic):
            return losses

        def __call__(self, particles: dict[str, Tensor]) -> Tensor:
            return quadratic(particles)

    problem = Problem()
    steps = [swarm(points())[1].step for _ in range(6)]
    ways = [quadratic, problem, problem.losses, problem.ready, partial(quadratic), lambda losses=quadratic: losses]
    assert len({step(way) for step, way in zip(steps, ways, strict=True)}) == 1


def test_a_state_saved_before_the_first_step_starts_anew() -> None:
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    fresh, other = CBO([("x", x)], num_particles=4, seed=1), CBO([("x", y)], num_particles=4, seed=1)
    other.step(quadratic)
    other.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        y.fill_(1.0)
    assert fresh.step(quadratic) == other.step(quadratic)
    assert torch.equal(x, y)


def test_settings_of_a_group_reach_its_own_coordinates() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    groups = [{"params": [("a", a)], "lr": 0.0}, {"params": [("b", b)]}]
    optimizer = CBO(groups, num_particles=6, alpha=0.1, seed=0)
    before = {name: p.clone() for name, p in optimizer.particles.items()}
    optimizer.step(lambda particles: sum(p.square().sum(-1) for p in particles.values()))
    assert torch.equal(optimizer.particles["a"], before["a"])
    assert (optimizer.particles["b"] != before["b"]).all()
    assert (a == 0).all()
    assert (b != 0).all()


def test_a_closure_that_raises_leaves_the_parameters_where_they_were() -> None:
    x = nn.Parameter(torch.ones(3))
    optimizer, calls = CBO([x], num_particles=6, seed=0), []

    def closure() -> Tensor:
        calls.append(x.detach().clone())
        if len(calls) == 4:
            raise KeyboardInterrupt
        return x.square().sum()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert not torch.equal(calls[-1], torch.ones(3))
    assert x.tolist() == [1.0, 1.0, 1.0]


def test_a_particle_batch_without_finite_loss_keeps_the_consensus() -> None:
    calls = []

    def losses(p: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        return quadratic(p) * (math.nan if len(calls) == 2 else 1.0)

    x, optimizer = swarm(points(), batches=ParticleBatches(4))
    optimizer.step(losses)
    assert len(calls) == 3
    assert x.isfinite().all()


def test_particles_that_run_away_are_announced_and_then_named() -> None:
    v = points().float()
    with pytest.warns(UserWarning, match="sigma=50.*run away"):
        _, optimizer = swarm(v, sigma=50.0, alpha=0.0)

    def run() -> None:
        for _ in range(200):
            optimizer.step(lambda p: p["x"].sum(-1) * 0)

    with pytest.raises(RuntimeError, match="diverged; use a smaller sigma"):
        run()


def test_legitimate_settings_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swarm(points(8, 2), sigma=1.6, lr=0.01, noise="isotropic")
        swarm(points(8, 20), sigma=5.1, lr=0.01)


def test_batches_are_rounded_to_a_divisor() -> None:
    with pytest.warns(UserWarning, match="particle_batch_size=30 does not divide num_particles=100; using 25"):
        optimizer = CBO([nn.Parameter(torch.zeros(1))], batches=ParticleBatches(30))
    assert optimizer.param_groups[0]["particle_batch_size"] == 25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CBO([nn.Parameter(torch.zeros(1))], num_particles=5, batches=ParticleBatches(10))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        CBO([nn.Parameter(torch.zeros(1), requires_grad=False)]).step(quadratic)
    with pytest.raises(ValueError, match="real floating point"):
        CBO([nn.Parameter(torch.zeros(1, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="alpha is shared"):
        CBO([{"params": [nn.Parameter(torch.zeros(1))], "alpha": 3.0}])


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CBO, ConsensusHopping])
def test_resumes_to_the_bit_and_copies_agree(kind) -> None:
    def build() -> tuple[nn.Parameter, CBO | ConsensusHopping]:
        x = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        return x, kind([("x", x)], num_particles=20)

    torch.manual_seed(0)
    x, optimizer = build()
    for _ in range(3):
        optimizer.step(quadratic)
    file = io.BytesIO()
    torch.save([x.detach(), optimizer.state_dict()], file)
    copies = [copy.deepcopy((x, optimizer)), pickle.loads(pickle.dumps((x, optimizer)))]
    for _ in range(3):
        optimizer.step(quadratic)
    torch.manual_seed(99)  # the generator is the optimizer's own
    y, resumed = build()
    value, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    y.data.copy_(value)
    resumed.load_state_dict(state)
    for other, again in (*copies, (y, resumed)):
        for _ in range(3):
            again.step(quadratic)
        assert torch.equal(other, x)
        assert torch.equal(again.particles["x"], optimizer.particles["x"])
        assert torch.equal(again.best_particle()["x"], optimizer.best_particle()["x"])


def test_an_added_group_extends_the_particles_and_the_noise_goes_on() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(3))
    optimizer = CBO([("a", a)], num_particles=6, batches=ParticleBatches(None), init=InitialCloud(0.01, True), seed=0)
    first = optimizer.particles["a"].clone()
    optimizer.add_param_group({"params": [("b", b)]})
    assert torch.equal(optimizer.particles["a"], first)
    assert (optimizer.particles["b"] - 1).abs().max() < 0.1
    assert not torch.equal(optimizer.particles["b"][:, :2] - 1, first), "the same numbers were drawn again"
    optimizer.step(lambda p: p["a"].square().sum(-1) + p["b"].square().sum(-1))
    torch.testing.assert_close(b.detach(), optimizer.consensus()["b"])


def test_a_state_of_other_parameters_is_refused() -> None:
    _, optimizer = swarm(points(12, 3))
    optimizer.step(quadratic)
    _, other = swarm(points(12, 2))
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="3 coordinates, the trainable parameters 2"):
        other.step(quadratic)


def test_global_seed_and_own_seed() -> None:
    def first_particle(**arguments) -> Tensor:
        return CBO([nn.Parameter(torch.zeros(3))], **arguments).particles["0"][0].clone()

    torch.manual_seed(1)
    a, b = first_particle(), first_particle()
    torch.manual_seed(1)
    assert torch.equal(first_particle(), a)
    assert not torch.equal(a, b)
    assert torch.equal(first_particle(seed=4), first_particle(seed=4))
