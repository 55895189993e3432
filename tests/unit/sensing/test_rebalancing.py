import pytest
import torch

from lit_methods.sensing import rebalance_factors_


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "k"), [(6, 3), (6, 6), (4, 7)])
def test_product_stays_and_left_becomes_orthogonal(rows, k):
    f, g = random(2, rows, k), random(2, 5, k, seed=1)
    product = f @ g.mT
    rebalance_factors_(f, g, beta=0.7)
    torch.testing.assert_close(f @ g.mT, product, rtol=0, atol=1e-12)
    s = torch.linalg.svdvals(f)
    torch.testing.assert_close(s, torch.full_like(s, 0.7))
    once = f.clone(), g.clone()
    rebalance_factors_(f, g, beta=0.7)
    torch.testing.assert_close((f, g), once, rtol=0, atol=1e-12)


def test_equals_the_papers_step_up_to_a_rotation():
    f, g = random(6, 3), random(5, 3, seed=1)
    u, s, vh = torch.linalg.svd(f, full_matrices=False)
    paper_f, paper_g = 0.5 * u, g @ vh.T * s / 0.5
    rebalance_factors_(f, g, beta=0.5)
    torch.testing.assert_close(f @ f.T, paper_f @ paper_f.T)
    torch.testing.assert_close(g @ g.T, paper_g @ paper_g.T)


def test_columns_without_any_weight_are_kept_out_of_the_product():
    f, g = random(6, 3), random(5, 3, seed=1)
    f[:, 2] = 0
    product = f @ g.T
    rebalance_factors_(f, g, beta=1.0)
    torch.testing.assert_close(f @ g.T, product)
    assert int(torch.linalg.matrix_rank(g, rtol=1e-10)) == 2


def test_default_beta_comes_from_the_signal():
    u, v = torch.linalg.qr(random(8, 4)).Q, torch.linalg.qr(random(7, 4, seed=1)).Q
    s = torch.tensor([1.0, 0.5, 1e-4, 1e-5], dtype=torch.float64)
    f, g = torch.stack([u, u]), torch.stack([v * s, v * s])
    g[1] = v * s.new_tensor([2.0, 1.5, 1.2, 0.9])  # no gap: everything is signal
    beta = rebalance_factors_(f.clone(), g.clone())
    torch.testing.assert_close(beta, s.new_tensor([0.25, 0.45]).sqrt())
    torch.testing.assert_close(rebalance_factors_(f.clone(), g.clone(), rank=1), s.new_tensor([0.5, 1.0]).sqrt())


def test_low_precision_factors_are_computed_in_float32():
    f, g = random(6, 3).bfloat16(), random(5, 3).bfloat16()
    product = f.float() @ g.float().T
    rebalance_factors_(f, g, beta=1.0)
    assert f.dtype == torch.bfloat16
    torch.testing.assert_close(f.float() @ g.float().T, product, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("f", "arguments", "message"),
    [
        (torch.ones(4, 2), {}, "left and right must be"),
        (torch.ones(4, 3), {"beta": 0.0}, "beta must be > 0"),
        (torch.ones(4, 3), {"rank": 4}, "rank must be in"),
        (torch.full((4, 3), torch.nan), {}, "must be finite"),
        (torch.ones(4, 3), {"max_sharpness": 0.5}, "max_sharpness must be >= 1"),
    ],
)
def test_bad_input(f, arguments, message):
    with pytest.raises(ValueError, match=message):
        rebalance_factors_(f, torch.ones(5, 3), **arguments)


def test_a_product_of_zero_is_left_alone():
    f, g = random(2, 6, 3), random(2, 5, 3, seed=1)
    f[0] = 0
    before = f.clone(), g.clone()
    betas = rebalance_factors_(f, g)
    assert betas[0] == 0 < betas[1]
    assert torch.equal(f[0], before[0][0])
    assert torch.equal(g[0], before[1][0])
    torch.testing.assert_close(f[1] @ g[1].mT, before[0][1] @ before[1][1].mT)
    tiny = 1e-30 * torch.randn(4, 2), torch.randn(3, 2)  # as after LoRA's first step
    rebalance_factors_(*tiny)
    assert all(x.isfinite().all() for x in tiny)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_only_real_floating_point_factors(dtype):
    f, g = torch.ones(4, 2, dtype=dtype), torch.ones(3, 2)
    with pytest.raises(TypeError, match="left must have a real floating-point dtype, got torch"):
        rebalance_factors_(f, g)
    with pytest.raises(TypeError, match="right must have a real floating-point dtype, got torch"):
        rebalance_factors_(g, f)


def test_the_default_beta_bounds_the_sharpness():
    """sigma = 1, 0.01: sqrt(0.01 / 2) would make the sharpness 200 times the present one."""
    u, v = torch.linalg.qr(random(8, 2)).Q, torch.linalg.qr(random(7, 2, seed=1)).Q
    root = torch.tensor([1.0, 0.1], dtype=torch.float64)

    def sharpness(multiple):
        f, g = u * root, v * root
        rebalance_factors_(f, g, rank=2, max_sharpness=multiple)
        return float(torch.linalg.matrix_norm(f, 2) ** 2 + torch.linalg.matrix_norm(g, 2) ** 2)

    assert sharpness(1.0) == pytest.approx(2)
    assert sharpness(4.0) == pytest.approx(8)
    assert sharpness(1e3) == pytest.approx(0.005 + 1 / 0.005)
