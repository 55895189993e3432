import warnings

import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules import TensorDataModule
from lit_methods.diffusion import Denoiser, Diffusion, Labels, TimeMLP, denoising_loss
from lit_methods.diffusion.streams import stream
from tests.unit.diffusion.closed_forms import gaussian_denoiser

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "use_distributed_sampler": False,
}


def points(n: int = 64) -> TensorDataModule:
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + torch.tensor([1.0, -0.5])
    rows = SupervisedBatch(x, torch.arange(n) % 3)
    return TensorDataModule(train=rows, val=rows, test=rows, batch_size=16)


def test_streams_are_functions_of_their_place() -> None:
    draws = {place: torch.rand(3, generator=stream("cpu", *place)).tolist() for place in [(1, 0), (1, 1), (2, 0)]}
    assert len({tuple(d) for d in draws.values()}) == 3
    assert torch.rand(3, generator=stream("cpu", 1, 0)).tolist() == draws[1, 0]


def test_the_exact_model_has_the_least_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = gaussian_denoiser("fm")
    x0 = torch.tensor([1.0, -0.5]) + torch.tensor([0.5, 1.5]) * torch.randn(4000, 2, generator=generator)
    eps = torch.randn(4000, 2, generator=generator)
    t = torch.rand(4000, generator=generator) * 0.98 + 0.01
    losses = []
    for shift in (-0.2, 0.0, 0.2):
        denoiser = Denoiser(lambda x, t, shift=shift: exact.flow(x, t) + shift, "fm", "flow")
        losses.append(float(denoising_loss(denoiser, x0, eps, t).mean()))
    assert losses[1] < min(losses[0], losses[2])


def test_training_is_reproducible_and_ranks_would_differ() -> None:
    def first_loss(rank: int) -> float:
        torch.manual_seed(3)
        model = Diffusion(TimeMLP([2], width=8), seed=5)
        return model.loss(points().train_data[0], generator=stream("cpu", model.seed, rank, "train", 0)).item()

    assert first_loss(0) == first_loss(0)
    assert first_loss(0) != first_loss(1)


def test_learns_gaussian_data() -> None:
    torch.manual_seed(0)
    model = Diffusion(TimeMLP([2], width=32), optimizer=lambda params: torch.optim.Adam(params, lr=5e-3), seed=0)
    data = points(512)
    data.batch_size = 128
    Trainer(max_epochs=100, limit_val_batches=0, **QUIET).fit(model, data)
    out = model.sample(2000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(out.mean(0), torch.tensor([1.0, -0.5]), rtol=0, atol=0.15)
    torch.testing.assert_close(out.std(0), torch.tensor([0.5, 0.5]), rtol=0.25, atol=0)


def test_conditions_reach_the_network_and_some_are_dropped() -> None:
    seen: list[torch.Tensor] = []
    net = TimeMLP([2], width=8, num_classes=3)
    net.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    model = Diffusion(net, conditioning=Labels(3, dropout=0.5), seed=0)
    Trainer(max_epochs=4, limit_val_batches=0, **QUIET).fit(model, points())
    labels = torch.cat(seen)
    assert 0.3 < float((labels == 3).float().mean()) < 0.7
    assert labels.unique().tolist() == [0, 1, 2, 3]
    rows = Trainer(**QUIET).predict(model, points())
    assert rows is not None
    assert torch.cat(rows).shape == (64, 2)


def test_labels_out_of_range_are_refused() -> None:
    model = Diffusion(TimeMLP([2], width=8, num_classes=2), conditioning=Labels(2))
    with pytest.raises(ValueError, match=r"cond must be labels below num_classes=2 .* got 0 to 3"):
        model.training_step(SupervisedBatch(torch.ones(2, 2), torch.tensor([0, 3])), 0)


def test_no_shape_is_known_before_training() -> None:
    model = Diffusion(TimeMLP([2], width=8))
    with pytest.raises(ValueError, match="shape must be given before the model was trained"):
        model.sample(3)
    assert model.sample(3, shape=[2], steps=2).shape == (3, 2)


def test_warns_where_the_spread_of_the_data_is_not_sigma_data() -> None:
    batch = SupervisedBatch(2 * torch.randn(64, 2), torch.zeros(64))
    with pytest.warns(UserWarning, match=r"sigma_data=0.5, but the first batch has standard deviation"):
        Diffusion(TimeMLP([2], width=8), "edm", "edm", "edm").training_step(batch, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Diffusion(TimeMLP([2], width=8)).training_step(batch, 0)
    assert not [w for w in caught if "sigma_data" in str(w.message)]


def test_says_that_min_snr_vanishes_at_pure_noise() -> None:
    with pytest.warns(UserWarning, match="min_snr weighs 'x0' by nearly 0"):
        Diffusion(TimeMLP([2], width=8), prediction="x0", weighting="min_snr")
