from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from matplotlib.figure import Figure

from lit_methods.batches import SupervisedBatch
from lit_methods.callbacks import LikelihoodEvaluation, RestorationGrid, SampleGrid, SampleQuality
from lit_methods.callbacks.diffusion.sample_grid import draw_samples
from lit_methods.datamodules import TensorDataModule
from lit_methods.diffusion import Diffusion, Labels, Sampling, TimeMLP, nll
from lit_methods.metrics import ClassifierConfidence, NearestDistance, SlicedWasserstein


def images(n: int = 24) -> TensorDataModule:
    x = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = SupervisedBatch(x, torch.arange(n) % 3)
    return TensorDataModule(train=rows, val=rows, test=rows, batch_size=8)


def model() -> Diffusion:
    torch.manual_seed(0)
    net = TimeMLP([1, 4, 4], width=8, num_classes=3)
    return Diffusion(net, conditioning=Labels(3), sampling=Sampling(steps=3), seed=0)


def trainer(folder: Path, *callbacks, **settings) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(
        default_root_dir=folder,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **quiet,
        **{"max_epochs": 2, **settings},
    )


def test_quality_of_variants_is_logged_in_validation_and_test(tmp_path: Path) -> None:
    quality = SampleQuality(
        {"distance": SlicedWasserstein()},
        {"nearest": NearestDistance(), "class": ClassifierConfidence(3)},
        variants={"one": {"steps": 1}, "two": {"solver": "euler", "steps": 2}},
        every_n_epochs=2,
    )
    run, data, module = trainer(tmp_path, quality), images(), model()
    run.fit(module, data)
    names = {f"val/{v}/{m}" for v in ("one", "two") for m in ("distance", "nearest", "confidence", "entropy")}
    assert names <= set(run.callback_metrics)
    (first,), (again,) = (run.test(module, data, verbose=False) for _ in range(2))
    assert first == again
    assert first["test/one/distance"] != first["test/two/distance"]
    # The same samples, measured by hand.
    metric = NearestDistance()
    metric.update(data.train_data[0], real=True)
    from lit_methods.diffusion.streams import stream

    for batch_idx, batch in enumerate(data.test_dataloader()):
        generator = stream("cpu", 0, 0, "test", 0, batch_idx)
        metric.update(module.sample(8, batch.y, steps=1, generator=generator), real=False)
    assert first["test/one/nearest"] == pytest.approx(float(metric.compute()), rel=1e-5)


def test_train_metrics_need_training_data(tmp_path: Path) -> None:
    quality = SampleQuality(train_metrics={"nearest": NearestDistance()})
    with pytest.raises(ValueError, match="train_metrics need a datamodule whose train_data are there"):
        trainer(tmp_path, quality).test(model(), images().test_dataloader(), verbose=False)


def test_pictures_of_samples_and_of_their_making(tmp_path: Path) -> None:
    trainer(tmp_path, SampleGrid(9, num_classes=3, trajectory=3)).fit(model(), images())
    assert (tmp_path / "samples.png").stat().st_size > 1000
    assert (tmp_path / "samples_trajectory.png").stat().st_size > 1000


def test_a_grid_has_each_image_in_its_place() -> None:
    axes = Figure().subplots()
    draw_samples(axes, torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 2, 2), columns=3)
    grid = axes.images[0].get_array()
    assert grid.shape == (6, 9)  # two rows of three images, each with a margin of one
    assert [float(grid[0, 0]), float(grid[0, 3]), float(grid[3, 3])] == [0, 0.25, 1]
    with pytest.raises(ValueError, match=r"samples must be images .* or points .* got \(5, 3\)"):
        draw_samples(axes, torch.zeros(5, 3))


def test_restored_images_fit_what_was_seen_better_than_free_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Diffusion(TimeMLP([1, 4, 4], width=32), seed=0)
    restore = RestorationGrid(num_images=4, steps=50)
    trainer(tmp_path, restore, max_epochs=30).fit(module, images())
    for task in ("inpainting", "super-resolution"):
        assert restore.errors[task] < 0.7 * restore.errors[f"{task} without guidance"]
    assert (tmp_path / "restoration.png").stat().st_size > 1000


def test_likelihood_of_test_data_is_logged_as_it_is_outside(tmp_path: Path) -> None:
    module, data = model(), images()
    run = trainer(tmp_path, LikelihoodEvaluation(steps=4, probes=None))
    (logged,) = run.test(module, data, verbose=False)
    x, y = data.test_data
    assert logged["test/nll"] == pytest.approx(float(nll(module.denoiser, x, y, steps=4, probes=None).mean()), rel=1e-4)
    run = trainer(tmp_path, LikelihoodEvaluation(steps=4, levels=17))
    (logged,) = run.test(module, data, verbose=False)
    expected = logged["test/nll"] / (16 * torch.tensor(2.0).log()) + 3
    assert logged["test/bits_per_dim"] == pytest.approx(float(expected), rel=1e-4)
