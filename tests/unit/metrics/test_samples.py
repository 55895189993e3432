import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from lit_methods.metrics import (
    MMD,
    ClassifierConfidence,
    ClassifierFeatures,
    NearestDistance,
    PrecisionRecall,
    SampleMoments,
    SlicedWasserstein,
)


def normal(n: int, seed: int, shift: float = 0.0, dims: int = 3) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed)) + shift


def filled(metric, real: Tensor, generated: Tensor):
    for part in real.split(100):
        metric.update(part, real=True)
    for part in generated.split(70):
        metric.update(part, real=False)
    return metric.compute()


def test_sliced_wasserstein_of_a_shift_is_its_length_along_a_direction() -> None:
    x = normal(500, 0)
    # The mean over directions of the squared projection of (1, 1, 1) is 3 / 3.
    assert float(filled(SlicedWasserstein(4000), x, x + 1)) == pytest.approx(1, abs=0.03)
    assert float(filled(SlicedWasserstein(), x, x)) == 0


def test_mmd_is_unbiased_and_sees_a_shift() -> None:
    values = [float(filled(MMD(), normal(200, 2 * i), normal(200, 2 * i + 1))) for i in range(20)]
    assert abs(sum(values) / 20) < 2e-3
    assert min(values) < 0
    assert float(filled(MMD(), normal(200, 0), normal(200, 1, shift=0.5))) > 0.02


def test_precision_and_recall_of_half_a_distribution() -> None:
    real = torch.cat([normal(200, 0), normal(200, 1, shift=20.0)])
    half = filled(PrecisionRecall(), real, normal(300, 2))
    assert float(half["precision"]) > 0.8
    assert 0.3 < float(half["recall"]) <= 0.5
    elsewhere = filled(PrecisionRecall(), real, normal(300, 3, shift=-30.0))
    assert float(elsewhere["precision"]) == float(elsewhere["recall"]) == 0


def test_nearest_distance() -> None:
    real = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert float(filled(NearestDistance(), real, torch.tensor([[0.0, 1.0], [3.0, 4.0]]))) == 0.5


def test_confidence_by_neighbours_and_by_a_classifier() -> None:
    metric = ClassifierConfidence(3, k=2)
    metric.update(
        torch.tensor([[0.0], [0.1], [5.0], [5.1], [9.0], [9.1]]), real=True, y=torch.tensor([0, 0, 1, 1, 2, 2])
    )
    metric.update(torch.tensor([[0.05], [5.05], [7.05]]), real=False)
    assert float(metric.compute()["confidence"]) == pytest.approx((1 + 1 + 0.5) / 3)
    assert float(metric.compute()["entropy"]) == pytest.approx(0.6365, abs=1e-3)
    sure = ClassifierConfidence(2, classifier=nn.Sequential(nn.Flatten(), nn.Linear(1, 2)))
    sure.update(torch.ones(4, 1), real=True)
    sure.update(torch.ones(4, 1), real=False)
    assert float(sure.compute()["entropy"]) == 0
    with pytest.raises(ValueError, match="y must be the labels of real samples"):
        ClassifierConfidence(2).update(torch.ones(2, 1), real=True)


def test_classifier_features_serve_torchmetrics() -> None:
    torch.manual_seed(0)
    x = torch.zeros(200, 1, 8, 8)
    y = torch.arange(200) % 2
    x[y == 1, :, :4] = 1
    x += 0.1 * torch.randn(x.shape)
    features = ClassifierFeatures(num_classes=2, num_features=8, image_size=8)
    assert features.fit(x, y, epochs=20, batch_size=20) > 0.95
    assert not features.training
    fid = KernelInceptionDistance(feature=features, subset_size=50)
    fid.update(x[:100], real=True)
    fid.update(x[100:], real=False)
    same = float(fid.compute()[0])
    fid.reset()
    fid.update(x[:100], real=True)
    fid.update(torch.rand(100, 1, 8, 8), real=False)
    assert float(fid.compute()[0]) > 10 * abs(same)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SlicedWasserstein(0), "directions must be >= 1, got 0"),
        (lambda: SlicedWasserstein(seed=-1), "seed must be"),
        (lambda: MMD(widths=(0.0,)), "widths must be"),
        (lambda: PrecisionRecall(0), "k must be"),
        (lambda: filled(PrecisionRecall(5), normal(3, 0), normal(9, 0)), "k must be < 3"),
        (lambda: filled(NearestDistance(), normal(1, 0), normal(9, 0)), "two real and two generated samples, got 1"),
        (lambda: ClassifierConfidence(1), "num_classes must be"),
        (lambda: ClassifierFeatures(num_classes=1), "in_channels and num_features must be"),
        (lambda: ClassifierFeatures(image_size=6), "image_size must be divisible by 4, got 6"),
    ],
)
def test_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_moments_are_those_of_the_generated_values() -> None:
    x = normal(500, 0, shift=3.0)
    found = filled(SampleMoments(), x + 100, x)
    torch.testing.assert_close(found, {"mean": x.mean(), "std": x.std()}, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="there must be two generated values, got 0"):
        SampleMoments().compute()
