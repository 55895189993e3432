"""The LightningModule, its diagnostics, and the models of the recipes."""

import math
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from scipy.stats import genpareto
from torch import Tensor, nn
from torch.distributions import Beta, MultivariateNormal, Normal

from lit_methods.batches import ObservationBatch, SupervisedBatch
from lit_methods.datamodules import (
    DiabetesDataModule,
    DigitScenesDataModule,
    MultiMNISTDataModule,
    RepeatedObservationDataModule,
    TensorDataModule,
)
from lit_methods.vi import ProgrammableVI
from lit_methods.vi.programmable import (
    Estimate,
    GradientCheck,
    MovingAverage,
    Objective,
    Prediction,
    Program,
    Simulation,
    SiteVariance,
    Trace,
    batched,
    effective_sample_size,
    elbo,
    normalize,
    observe,
    pareto_k_hat,
    program,
    sample,
)
from lit_methods.vi.programmable.examples import (
    BetaGuide,
    CoinModel,
    ConeModel,
    NormalGuide,
    RegressionModel,
    RingGuide,
    SceneGuide,
    SceneModel,
    VAEGuide,
    VAEModel,
    WeightGuide,
)
from tests.standins.idx_files import write_mnist

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
FLIPS = [1.0] * 6 + [0.0] * 4


def fit(module: ProgrammableVI, data: TensorDataModule, epochs: int = 1, **options) -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(**{**QUIET, **options}, max_epochs=epochs)
    trainer.fit(module, data)
    return trainer


# training


def test_coin_approaches_the_exact_posterior() -> None:
    module = ProgrammableVI(
        CoinModel(), BetaGuide(8.0, 8.0), num_samples=64, optimizer=lambda p: torch.optim.Adam(p, 0.1)
    )
    fit(module, RepeatedObservationDataModule(FLIPS, repeats=250))
    guide = module.guide.function
    q = Beta(guide.log_heads.exp(), guide.log_tails.exp())
    assert q.mean.item() == pytest.approx(16 / 30, abs=0.01)
    assert q.stddev.item() == pytest.approx(Beta(16.0, 14.0).stddev.item(), abs=0.01)


def test_signs_of_logged_values_agree_everywhere() -> None:
    for objective in ("elbo", "iwelbo", "renyi", "wake_q", "reweighted_wake_sleep"):
        module = ProgrammableVI(CoinModel(), BetaGuide(), objective=objective)
        trainer = fit(module, RepeatedObservationDataModule(FLIPS, repeats=2))
        for stage in ("train", "val"):
            found = trainer.callback_metrics
            assert found[f"{stage}/loss"] == -found[f"{stage}/elbo"]
    assert -9 < trainer.validate(module, RepeatedObservationDataModule(FLIPS), verbose=False)[0]["val/elbo"] < 9


class Mixture(nn.Module):
    def __init__(self, learned: bool = True) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()), requires_grad=learned)

    def forward(self, batch: ObservationBatch) -> None:
        z = sample("z", Normal(0.0, 1.0))
        observe("x", Normal(z + self.shift, 1.0), batch.values[..., 0])


class Amortised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, batch: ObservationBatch) -> None:
        loc, scale = self.linear(batch.values).unbind(-1)
        sample("z", Normal(loc, scale.exp()))


DATA = RepeatedObservationDataModule([3.0], repeats=8, batch_size=4)


def test_wake_sleep_without_learned_model_parameters_trains_the_guide() -> None:
    module = ProgrammableVI(Mixture(learned=False), Amortised(), objective="wake_q", model_objective="wake_p")
    before = module.guide.function.linear.weight.clone()
    fit(module, DATA)
    assert not torch.equal(before, module.guide.function.linear.weight)


def test_two_objectives_train_a_part_each() -> None:
    module = ProgrammableVI(Mixture(), Amortised(), objective="wake_q", model_objective="wake_p", num_particles=4)
    batch = ObservationBatch(torch.full((4, 1), 3.0))
    module.log_dict = lambda *a, **k: None  # type: ignore[method-assign]
    torch.manual_seed(0)
    module.training_step(batch, 0).backward()
    torch.manual_seed(0)
    part = module.estimate(batch)
    (expected,) = torch.autograd.grad(-part.surrogate.mean(), [module.guide.function.linear.weight])
    torch.testing.assert_close(module.guide.function.linear.weight.grad, expected)
    assert module.model.function.shift.grad is not None
    assert all(p.requires_grad for p in module.parameters())


def test_an_objective_without_gradients_is_an_error() -> None:
    guide = program(lambda batch: sample("z", Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match=r"no parameter receives a gradient from objective elbo\(\)"):
        fit(ProgrammableVI(nn.Sequential(Mixture(learned=False)), guide, optimizer=_sgd_of_nothing), DATA)


def _sgd_of_nothing(params):
    return torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)


def test_parameters_without_a_gradient_are_named_once() -> None:
    module = ProgrammableVI(Mixture(), Amortised(), objective="wake_q")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, DATA)
    found = [str(w.message) for w in caught if "without a gradient" in str(w.message)]
    assert len(found) == 1
    assert "model.function.shift" in found[0]


def test_baselines_may_have_their_own_learning_rate() -> None:
    guide = SceneGuide(grads=["baseline"], image_size=8, object_size=4, what_dim=2, hidden_dim=4, encoder_dim=4)
    model = SceneModel(presence=[0.5], image_size=8, object_size=4, what_dim=2, hidden_dim=4)
    optimizer = ProgrammableVI(model, guide, baseline_lr=0.1).configure_optimizers()
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.1]
    assert sizes[1] == sum(p.numel() for p in guide.baseline.parameters())  # type: ignore[union-attr]


def test_objectives_by_import_path_and_settings() -> None:
    path = "lit_methods.vi.programmable.objectives.iwelbo"
    assert repr(ProgrammableVI(Mixture(), Amortised(), path, num_particles=3).objective) == "iwelbo(num_particles=3)"
    module = ProgrammableVI(Mixture(), Amortised(), "renyi", settings={"alpha": 0.25})
    assert module.objective.settings == {"alpha": 0.25}
    module = ProgrammableVI(ConeModel(), RingGuide(), "iwhvi", settings={"keep": ["x", "y"], "num_auxiliary": 2})
    assert isinstance(module.objective, Objective)


def test_what_one_asks_a_trained_module() -> None:
    module = ProgrammableVI(Mixture(), Amortised(), num_samples=5)
    batch = ObservationBatch(torch.randn(4, 1))
    assert module(batch)["z"].shape == (5, 4)
    assert isinstance(module.sample_posterior(batch), Trace)
    prediction = module.posterior_predictive(batch, 3)
    assert isinstance(prediction, Prediction)
    assert prediction.drawn["x"].shape == (3, 4)
    assert torch.equal(prediction.observed["x"], batch.values[:, 0])
    assert module.log_weights(batch, 6).shape == (6, 4)
    assert isinstance(module.estimate(batch), Estimate)
    assert module.batch_shape({"a": "text", "b": [batch]}) == (4,)
    with pytest.raises(ValueError, match="batch_dims must be <= the dimensions"):
        ProgrammableVI(Mixture(), Amortised(), batch_dims=3).batch_shape(batch)


def test_names_that_are_returned() -> None:
    assert Simulation._fields == ("trace", "log_w", "value")
    assert GradientCheck._fields == ("exact", "mean", "standard_error", "z")
    assert SiteVariance._fields == ("strategy", "norm", "variance")


def test_programs_of_ones_own_must_say_what_they_can() -> None:
    class Empty(Program):
        pass

    with pytest.raises(NotImplementedError, match="Empty cannot generate"):
        Empty().generate()
    with pytest.raises(NotImplementedError, match="Normalized cannot predict"):
        normalize(Mixture(), Amortised()).predict({})


def test_moving_averages_are_in_checkpoints(tmp_path) -> None:
    class Guide(Amortised):
        def __init__(self) -> None:
            super().__init__()
            self.average = MovingAverage()

    module = ProgrammableVI(Mixture(), Guide())
    assert "guide.function.average.average" in module.state_dict()


# diagnostics


@pytest.mark.parametrize("k", [0.1, 0.5, 0.9])
def test_k_hat_of_pareto_weights(k) -> None:
    draws = genpareto.rvs(k, size=(20_000, 8), random_state=np.random.default_rng(0))
    found = pareto_k_hat(torch.from_numpy(draws).log())
    assert found.shape == (8,)
    assert found.mean().item() == pytest.approx(k, abs=0.07)


def test_k_hat_of_equal_weights_and_of_few() -> None:
    assert pareto_k_hat(torch.zeros(100, 2)).tolist() == [-math.inf, -math.inf]
    with pytest.raises(ValueError, match="log_w must hold at least 25 weights, got 24"):
        pareto_k_hat(torch.zeros(24))


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.zeros(7)).item() == pytest.approx(7)
    assert effective_sample_size(torch.tensor([0.0, -200.0, -200.0])).item() == pytest.approx(1)


# models of the recipes


def test_regression_reaches_the_exact_evidence() -> None:
    data = DiabetesDataModule()
    data.setup("fit")
    rows = data.train_data
    assert rows is not None
    model, guide = RegressionModel(10, len(rows.x)).eval(), WeightGuide(10)
    mean, covariance, evidence = model.posterior(rows)

    def exact(batch: SupervisedBatch) -> None:
        sample("w", MultivariateNormal(mean.float(), covariance.float()))

    assert elbo(model, exact)(rows, num_samples=20).value.item() == pytest.approx(evidence.item(), abs=0.05)
    assert elbo(model, guide)(rows, num_samples=20).value.item() < evidence.item()
    model.train()
    parts = [SupervisedBatch(rows.x[i::4], rows.y[i::4]) for i in range(4)]
    torch.manual_seed(0)
    whole = elbo(model, guide)(rows).value
    values = []
    for part in parts:
        torch.manual_seed(0)
        values.append(elbo(model, guide)(part).value)
    assert (sum(values) / 4).item() == pytest.approx(whole.item(), rel=2e-3)  # 80 or 81 rows in a part


def test_cone_values_by_hand() -> None:
    batch = ObservationBatch(torch.tensor([[5.0]]))
    x, y = torch.tensor([1.0]), torch.tensor([2.0])
    with batched((1,)):
        found = program(ConeModel()).log_density({"x": x, "y": y}, batch)
        simulation = program(NormalGuide((1.0, 2.0), (-20.0, -20.0))).simulate(batch)
        ring = program(RingGuide((-20.0, -20.0))).simulate(batch).trace
    exact = Normal(0.0, 10.0).log_prob(torch.tensor([1.0, 2.0])).sum() + Normal(5.0, 0.15).log_prob(torch.tensor(5.0))
    torch.testing.assert_close(found, exact[None])
    torch.testing.assert_close(simulation.trace["y"], y)
    torch.testing.assert_close(ring["x"] ** 2 + ring["y"] ** 2, torch.tensor([5.0]))


@pytest.mark.parametrize("grads", [["enum", "mvd"], ["baseline", "reinforce"]])
def test_scenes_have_shapes_that_fit(grads) -> None:
    sizes = {"image_size": 20, "object_size": 8, "what_dim": 3, "hidden_dim": 8}
    model, guide = SceneModel(presence=[0.3, 0.1], **sizes), SceneGuide(grads, encoder_dim=8, **sizes)
    batch = SupervisedBatch(torch.rand(5, 1, 20, 20), torch.zeros(5, dtype=torch.int64))
    for samples in (1, 2):
        estimate = elbo(model, guide)(batch, batch_shape=(5,), num_samples=samples)
        assert estimate.value.shape == (5,)
        (-estimate.surrogate.mean() + estimate.baseline_loss).backward()
    assert all(p.grad is not None for p in guide.parameters())


def test_an_object_is_looked_at_where_it_was_put() -> None:
    model, guide = SceneModel([0.5], image_size=24, object_size=8), SceneGuide(["enum"], image_size=24, object_size=8)
    thing = torch.nn.functional.interpolate(torch.rand(1, 1, 2, 2), (8, 8), mode="bilinear").flatten(1)
    where = torch.tensor([[3.0, -1.5, 0.75]])
    torch.testing.assert_close(guide._crop(where, model._place(where, thing)), thing, rtol=0, atol=1e-4)


def test_vae_trains_a_step() -> None:
    module = ProgrammableVI(VAEModel(64, 4, 16), VAEGuide(64, 4, 16), objective="iwelbo", num_samples=2)
    rows = SupervisedBatch(torch.rand(12, 1, 8, 8).round(), torch.zeros(12, dtype=torch.int64))
    fit(module, TensorDataModule(train=rows, val=rows, batch_size=4))
    assert module.posterior_predictive(rows, 1).value.shape == (12, 64)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CoinModel(heads=0.0), "heads must be > 0"),
        (lambda: BetaGuide(tails=-1.0), "tails must be > 0"),
        (lambda: NormalGuide(mean=(math.nan, 0.0)), "mean must be two finite"),
        (lambda: RingGuide(log_scale=(0.0,)), "log_scale must be two finite"),
        (lambda: VAEModel(latent_dim=0), "latent_dim must be >= 1, got 0"),
        (lambda: VAEGuide(num_pixels=0), "num_pixels must be >= 1, got 0"),
        (lambda: RegressionModel(0, 5), "num_features must be >= 1, got 0"),
        (lambda: RegressionModel(1, 5, noise=0.0), "noise must be > 0"),
        (lambda: WeightGuide(1, std=0.0), "std must be > 0"),
        (lambda: SceneModel(presence=[1.0]), "presence must hold probabilities"),
        (lambda: SceneModel(what_dim=0), "what_dim must be >= 1"),
        (lambda: SceneModel(noise=-1.0), "noise must be > 0"),
        (lambda: SceneModel(decoder_bias=math.inf), "decoder_bias must be finite"),
        (lambda: SceneGuide(grads=["enumerate"]), "grads must hold"),
        (lambda: SceneGuide(hidden_dim=0), "hidden_dim must be >= 1"),
        (lambda: SceneGuide(where_scale=0.0), "where_scale must be > 0"),
        (lambda: SceneGuide(presence_bias=math.nan), "presence_bias must be finite"),
    ],
)
def test_bad_arguments_of_examples(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# scenes


def test_scenes_hold_as_many_digits_as_they_say() -> None:
    data = DigitScenesDataModule(train_size=60, val_size=4, test_size=4)
    data.setup("fit")
    rows = data.train_data
    assert rows is not None
    assert rows.x.shape == (60, 1, 20, 20)
    assert rows.x.min() >= 0
    assert rows.x.max() <= 1
    assert set(rows.y.tolist()) == {0, 1, 2}
    ink = torch.stack([rows.x[rows.y == n].sum((1, 2, 3)).mean() for n in range(3)])
    assert ink[0] == 0
    assert ink[2] / ink[1] == pytest.approx(2, rel=0.2)


def test_multi_mnist_reads_the_files(tmp_path) -> None:
    write_mnist(tmp_path)
    data = MultiMNISTDataModule(str(tmp_path), max_digits=1, train_size=6, val_size=2, test_size=2)
    data.prepare_data()
    data.setup("fit")
    rows = data.train_data
    assert rows is not None
    assert rows.x.shape == (6, 1, 50, 50)
    counted: Tensor = rows.x.sum((1, 2, 3)) > 0
    assert torch.equal(counted.long(), rows.y)
