"""Costs between points; transport in tiles against transport with the whole matrix."""

import pytest
import torch
from torch import Tensor

from lit_methods.transport import OTLoss, grid_points, point_clouds, point_cost

F64 = torch.float64


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("p", [1, 2])
def test_point_cost(p):
    x, y = 100 + points(2, 5, 3), 100 + points(2, 4, 3, seed=1)
    expected = (x[:, :, None] - y[:, None]).norm(dim=-1) ** p
    torch.testing.assert_close(point_cost(x, y, p), expected, atol=1e-12, rtol=1e-12)


def test_grid_points_follow_flatten():
    grid = grid_points(2, 3)
    image = torch.arange(6.0).view(2, 3)
    assert grid.tolist() == [[i, j] for i in (0, 1) for j in (0, 1, 2)]
    assert [float(image[int(i), int(j)]) for i, j in grid] == image.flatten().tolist()


@pytest.mark.parametrize("most_share", [0.0, 1.0])  # without storing a Hessian, and storing it
@pytest.mark.parametrize(("p", "eta"), [(1, 4.0), (2, 1.0), (2, 200.0)])
def test_tiles_give_the_loss_and_gradients_of_the_matrix(p, eta, most_share, monkeypatch):
    monkeypatch.setattr(point_clouds, "_TILE", 150)
    monkeypatch.setattr(point_clouds, "_MOST_SHARE", most_share)
    inputs = (points(2, 40, 3), points(2, 31, 3, seed=1), points(2, 40, seed=2), points(2, 31, seed=3))
    results = []
    for tiled in (False, True):
        x, y, a, b = (z.clone().requires_grad_() for z in inputs)
        loss = OTLoss(eta, p, debias=True, reduction="none", tiled=tiled)(x, y, a.softmax(-1), b.softmax(-1))
        results.append((loss, *torch.autograd.grad(loss.sum(), (x, y, a, b))))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-8)


def test_tiles_are_used_whenever_no_matrix_fits(monkeypatch):
    """No tensor of n * m entries is made, forward or backward."""
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.layout == torch.strided:
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(point_clouds, "_TILE", 2000)
    x = points(400, 2).requires_grad_()
    with Watch():
        OTLoss(50.0, tiled=True)(x, points(300, 2, seed=1)).backward()
    assert 1000 < largest < 400 * 300 / 4


def test_second_derivatives_of_tiles_are_refused():
    x = points(5, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(OTLoss(2.0, tiled=True)(x, points(4, 2)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="Second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: point_cost(torch.zeros(2, 2), torch.zeros(2, 3)), "x and y must have shapes"),
        (lambda: point_cost(torch.zeros(2, 2), torch.zeros(2, 2), 3), "p must be 1 or 2"),
        (lambda: OTLoss(tiled=True)(torch.zeros(2, 2), torch.zeros(3, 3)), "x and y must have shapes"),
        (lambda: OTLoss(tiled=True)(torch.zeros(2, 2), torch.ones(2, 2), -torch.ones(2)), "a must be >= 0"),
        (lambda: grid_points(), "sizes must be"),
        (lambda: grid_points(3, 0), "sizes must be"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
