"""Distances against closed forms and scipy; losses and layers by their properties."""

import math

import pytest
import torch
from scipy.stats import wasserstein_distance as on_the_line
from torch import Tensor

from lit_methods.transport import (
    OTLoss,
    SinkhornAssignment,
    WassersteinDistance,
    grid_points,
    point_cost,
    wasserstein_distance,
)
from tests.distributed.launch import run_ranks

F64 = torch.float64


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_distance_on_the_line_is_scipys():
    x, y = points(30, 1), points(20, 1, seed=1) + 1
    a, b = points(30, seed=2).softmax(0), points(20, seed=3).softmax(0)
    exact = on_the_line(x[:, 0], y[:, 0], a, b)
    ours = float(wasserstein_distance(x, y, a, b, p=1, eta=20000.0))
    assert -1e-9 < ours - exact < 1e-3
    rough = float(wasserstein_distance(x, y, a, b, p=1))
    assert 0 < rough - exact < math.log(600) / 1000 * float(point_cost(x, y, 1).max())


@pytest.mark.parametrize("p", [1, 2])
def test_distance_of_a_translation_is_its_length(p):
    x = points(3, 20, 2)
    shift = torch.tensor([3.0, -4.0], dtype=F64)
    distances = wasserstein_distance(x, x + shift, p=p, eta=5000.0)
    torch.testing.assert_close(distances, torch.full((3,), 5.0, dtype=F64), atol=1e-3, rtol=0)


def test_distance_of_histograms():
    """All mass of an image moved by two pixels."""
    image = torch.full((6, 6), 1e-9, dtype=F64)
    moved = image.clone()
    image[1, 2] = moved[3, 2] = 1.0
    grid = grid_points(6, 6)
    a, b = (x.flatten() / x.sum() for x in (image, moved))
    for p in (1, 2):
        assert float(wasserstein_distance(grid, grid, a, b, p=p)) == pytest.approx(2.0, abs=1e-4)


def test_distance_of_a_set_to_itself_may_be_zero_everywhere():
    x = torch.zeros(4, 2, requires_grad=True)
    distance = wasserstein_distance(x, torch.zeros(4, 2), p=1)
    assert float(distance.detach()) == 0.0
    distance.backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("settings", [{}, {"p": 1}, {"value": "transport"}, {"debias": True}])
def test_gradients_of_the_loss(settings):
    loss = OTLoss(eta=3.0, reduction="none", **settings)
    inputs = (points(2, 5, 2).requires_grad_(), points(2, 4, 2, seed=1).requires_grad_())
    logits = (points(2, 5, seed=2).requires_grad_(), points(2, 4, seed=3).requires_grad_())

    def of(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return loss(x, y, a.softmax(-1), b.softmax(-1))

    torch.autograd.gradcheck(of, (*inputs, *logits), atol=1e-6)


def test_debiased_loss_is_a_divergence():
    loss = OTLoss(eta=2.0, debias=True, reduction="none")
    x, y = points(3, 6, 2), points(3, 8, 2, seed=1)
    torch.testing.assert_close(loss(x, x), torch.zeros(3, dtype=F64), atol=1e-9, rtol=0)
    assert (loss(x, y) > 0).all()
    torch.testing.assert_close(loss(x, y), loss(y, x))
    entropic = OTLoss(eta=2.0, reduction="none")
    torch.testing.assert_close(loss(x, y), entropic(x, y) - (entropic(x, x) + entropic(y, y)) / 2)


def test_reductions_and_precision():
    x, y = points(3, 6, 2), points(3, 6, 2, seed=1)
    each = OTLoss(eta=5.0, reduction="none")(x, y)
    torch.testing.assert_close(OTLoss(eta=5.0)(x, y), each.mean())
    torch.testing.assert_close(OTLoss(eta=5.0, reduction="sum")(x, y), each.sum())
    torch.testing.assert_close(OTLoss(eta=5.0)(x[0], y[0]), each[0])
    assert OTLoss(eta=5.0)(x.float(), y.float()).dtype == torch.float32
    assert OTLoss(eta=5.0, dtype="float64")(x.float(), y.float()).dtype == F64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(OTLoss(eta=5.0)(x.float(), y.float()).double(), each.mean(), atol=1e-4, rtol=0)
    assert OTLoss(eta=5.0)(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_assignment_learns_a_permutation():
    """The layer's matrix is doubly stochastic, and gradients through it find the permutation that sorts."""
    layer = SinkhornAssignment(eta=5.0)
    scores = torch.zeros(6, 6, dtype=F64, requires_grad=True)
    values = torch.tensor([3.0, 1.0, 4.0, 0.0, 5.0, 2.0], dtype=F64)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(60):
        matrix = layer(scores)
        loss = (matrix @ values - torch.arange(6.0, dtype=F64)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    matrix = layer(scores).detach()
    torch.testing.assert_close(matrix.sum(0), torch.ones(6, dtype=F64))
    torch.testing.assert_close(matrix.sum(1), torch.ones(6, dtype=F64))
    assert matrix.argmax(1).tolist() == values.argsort().tolist()


def test_metric_is_the_mean_over_batches():
    x, y = points(5, 6, 2), points(5, 7, 2, seed=1)
    metric = WassersteinDistance(p=1)
    metric.update(x[:3], y[:3])
    metric.update(x[3:], y[3:])
    expected = wasserstein_distance(x, y, p=1).mean()
    torch.testing.assert_close(metric.compute(), expected, check_dtype=False)
    metric.reset()
    metric.update(x[0], y[0])
    torch.testing.assert_close(metric.compute(), wasserstein_distance(x[0], y[0], p=1), check_dtype=False)


def _metric_on_a_rank(rank: int) -> tuple[float, Tensor, float, Tensor]:
    x, y = points(3, 6, 2), points(3, 6, 2, seed=1)
    metric = WassersteinDistance()
    share = slice(0, 1) if rank == 0 else slice(1, 3)
    metric.update(x[share], y[share])
    shift = torch.zeros(2, dtype=F64, requires_grad=True)
    model = torch.nn.parallel.DistributedDataParallel(_Shift(shift))
    OTLoss(eta=5.0)(model(x[rank]), y[rank]).backward()
    gradient = model.module.shift.grad.clone()
    model.zero_grad()
    joined = OTLoss(eta=5.0, gather=True)(model(x[rank]), y[rank], x[rank, :, 0].softmax(0))
    joined.backward()
    return float(metric.compute()), gradient, float(joined.detach()), model.module.shift.grad


class _Shift(torch.nn.Module):
    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(shift.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def test_two_ranks_reduce_the_metric_average_gradients_and_join_points():
    results = run_ranks(_metric_on_a_rank, 2)
    x, y = points(3, 6, 2), points(3, 6, 2, seed=1)
    shift = torch.zeros(2, dtype=F64, requires_grad=True)
    OTLoss(eta=5.0)(x[:2] + shift, y[:2]).backward()
    joint_shift = torch.zeros(2, dtype=F64, requires_grad=True)
    weights = x[:2, :, 0].softmax(-1).flatten() / 2
    joint = OTLoss(eta=5.0)(x[:2].flatten(0, 1) + joint_shift, y[:2].flatten(0, 1), weights)
    joint.backward()
    for value, gradient, joined, joined_gradient in results:
        assert value == pytest.approx(float(wasserstein_distance(x, y).mean()), rel=1e-6)
        torch.testing.assert_close(gradient, shift.grad, atol=1e-9, rtol=0)
        assert joined == pytest.approx(float(joint.detach()), abs=1e-12)
        torch.testing.assert_close(joined_gradient, joint_shift.grad, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OTLoss(eta=-1.0), "eta must be"),
        (lambda: OTLoss(p=3), "p must be 1 or 2"),
        (lambda: OTLoss(value="entropy"), "value must be"),
        (lambda: OTLoss(reduction="max"), "reduction must be"),
        (lambda: OTLoss(dtype="float16"), "dtype must be"),
        (lambda: OTLoss(debias=True, value="transport"), "debias=True needs"),
        (lambda: OTLoss(tiled=True, value="transport"), "tiled=True needs"),
        (lambda: SinkhornAssignment(eta=0.0), "eta must be"),
        (lambda: SinkhornAssignment()(torch.zeros(2, 3)), "scores must have shape"),
        (lambda: WassersteinDistance(p=0), "p must be 1 or 2"),
        (lambda: WassersteinDistance(eta=0.0), "eta must be"),
        (lambda: wasserstein_distance(torch.zeros(2, 2), torch.zeros(2, 2), eta=0.0), "eta must be"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("p", [1, 2])
def test_gradient_of_a_batch_with_a_distance_of_zero_is_finite(p):
    x = torch.zeros(2, 3, 2, requires_grad=True)
    y = torch.stack([torch.zeros(3, 2), torch.ones(3, 2)])
    distance = wasserstein_distance(x, y, p=p)
    torch.testing.assert_close(distance.detach(), torch.tensor([0.0, 2**0.5]))
    distance.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], torch.zeros(3, 2))
    torch.testing.assert_close(x.grad[1], torch.full((3, 2), -1 / (3 * 2**0.5)))


def test_one_hot_histograms():
    line = grid_points(4)[None].expand(4, -1, -1)
    first = torch.tensor([1.0, 0, 0, 0]).expand(4, -1)
    torch.testing.assert_close(wasserstein_distance(line, line, torch.eye(4), first, p=1), torch.arange(4.0))
