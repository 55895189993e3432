import pytest
import torch

from lit_methods.optim import (
    Ball,
    Box,
    DiagonalAdaGrad,
    Entropy,
    Euclidean,
    Hypentropy,
    OptimisticOMD,
    PNorm,
    Simplex,
    UnnormalizedEntropy,
)
from lit_methods.optim.mirror_maps import mirror_map

MAPS = {
    "euclidean": (Euclidean(), lambda x: x.square().sum() / 2),
    "entropy": (Entropy(), lambda x: (x * x.log()).sum()),
    "unnormalized_entropy": (UnnormalizedEntropy(), lambda x: (x * x.log() - x).sum()),
    "p_norm": (PNorm(1.3), lambda x: x.abs().pow(1.3).sum().pow(2 / 1.3) / 2),
    "hypentropy": (Hypentropy(0.7), lambda x: (x * (x / 0.7).asinh() - (x**2 + 0.49).sqrt()).sum()),
}


@pytest.mark.parametrize("name", MAPS)
def test_coordinates_are_the_gradient_of_psi_and_point_inverts_them(name):
    mirror, psi = MAPS[name]
    x = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(psi(x), x)
    y = mirror.coordinates(x.detach())
    offset = gradient - y if name == "entropy" else torch.zeros(1, 3)  # constants do not matter on the simplex
    torch.testing.assert_close(y + offset[:, :1], gradient)
    torch.testing.assert_close(mirror.point(y), x.detach())


@pytest.mark.parametrize("name", MAPS)
def test_a_step_solves_its_argmin(name):
    """grad psi(x) = grad psi(x') - g, up to a constant on the simplex."""
    mirror, psi = MAPS[name]
    start, g = torch.tensor([[0.2, 0.5, 0.3]]).double(), torch.tensor([[0.3, -0.1, 0.2]]).double()
    x = mirror.point(mirror.move(mirror.coordinates(start), g)).requires_grad_()
    before = start.clone().requires_grad_()
    difference = torch.autograd.grad(psi(x), x)[0] - torch.autograd.grad(psi(before), before)[0] + g
    if name == "entropy":
        difference = difference - difference.mean()
        assert float(x.detach().sum()) == pytest.approx(1)
    torch.testing.assert_close(difference, torch.zeros_like(difference))


def test_entropy_ignores_constants_and_does_not_underflow():
    mirror = Entropy()
    y = mirror.coordinates(torch.tensor([0.2, 0.8, 0.0], dtype=torch.float64))
    assert y.isfinite().all()
    g = torch.tensor([1.0, -2.0, 3.0])
    torch.testing.assert_close(mirror.move(y, g + 7), mirror.move(y, g))
    far = mirror.move(y, torch.tensor([0.0, 1e4, 0.0]))
    assert far.isfinite().all()
    torch.testing.assert_close(mirror.move(far, torch.tensor([0.0, -1e4, 0.0])), y)


def test_p_norm_is_safe_at_zero_and_euclidean_at_two():
    for p in (1.1, 1.5, 2.0):
        zero = torch.zeros(4)
        assert torch.equal(PNorm(p).coordinates(zero), zero)
        assert torch.equal(PNorm(p).point(zero), zero)
    x = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(PNorm(2.0).coordinates(x), x, rtol=1e-14, atol=0)


def test_hypentropy_becomes_euclidean():
    x, g = torch.tensor([0.3, -0.4]).double(), torch.tensor([0.2, 0.5]).double()
    wide = Hypentropy(1e5)
    torch.testing.assert_close(wide.point(wide.move(wide.coordinates(x), g / 1e5)), x - g, rtol=1e-8, atol=0)


def test_dual_norms():
    g = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
    assert float(Euclidean().dual_square(g)) == pytest.approx(14.25)
    assert float(Entropy().dual_square(g)) == 9 + 4
    assert float(UnnormalizedEntropy().dual_square(g)) == 9
    assert float(PNorm(1.5).dual_square(g)) == pytest.approx((1 + 27 + 8 + 0.125) ** (2 / 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Entropy(dim=0), "dim must be negative"),
        (lambda: PNorm(1.0), r"p must be in \(1, 2\], got 1.0"),
        (lambda: Hypentropy(0.0), "b must be > 0"),
        (lambda: DiagonalAdaGrad(-1.0), "epsilon must be >= 0"),
        (lambda: mirror_map("lp"), "mirror must be a mirror map or one of"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("mirror", "constraint", "message"),
    [
        ("entropy", Ball(1.0), "constraint must be Simplex with the mirror map Entropy, got Ball"),
        ("entropy", Simplex(dim=-2), "constraint must be Simplex"),
        ("hypentropy", Simplex(), "constraint must be Box"),
        (PNorm(1.5), Ball(1.0, per_tensor=True), "Ball with norm=1.5"),
        (PNorm(1.5), Ball(1.0, norm=1.5), "per_tensor=True"),
        ("euclidean", Ball(1.0, norm=1.5), "Ball with norm=2"),
        ("adagrad", Simplex(), "constraint must be Box or Ball"),
    ],
)
def test_inexact_pairs_are_refused(mirror, constraint, message):
    with pytest.raises(ValueError, match=message):
        OptimisticOMD([torch.full((2, 2), 0.5)], step_size="constant", mirror=mirror, constraint=constraint)


def test_boxes_are_exact_in_separable_geometries():
    """The Bregman projection minimises psi(u) - <y, u> over the box, entry by entry: compare with a fine grid."""
    for mirror, psi, high in (
        (UnnormalizedEntropy(), lambda u: u * u.log() - u, 2.0),
        (Hypentropy(0.5), lambda u: u * (u / 0.5).asinh() - (u**2 + 0.25).sqrt(), 2.0),
    ):
        y = torch.tensor([-3.0, -0.2, 0.4, 2.5], dtype=torch.float64)
        grid = torch.linspace(0.1, high, 20001, dtype=torch.float64)
        best = grid[(psi(grid)[None] - y[:, None] * grid).argmin(1)]
        (clamped,) = Box(0.1, high)([mirror.point(y)])
        torch.testing.assert_close(clamped, best, rtol=0, atol=2e-4)
