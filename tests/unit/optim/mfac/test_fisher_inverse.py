"""FisherInverse against the dense inverse, the recurrence and WoodFisher; collect_gradients against autograd."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lit_methods.optim import FisherInverse, collect_gradients
from lit_methods.optim.mfac.window import full_precision_products


def dense_inverse(grads: Tensor, damping: float, block_size: int | None = None) -> Tensor:
    m, d = grads.shape
    fisher = damping * torch.eye(d, dtype=grads.dtype) + grads.T @ grads / m
    block = torch.arange(d) // (block_size or d)
    return torch.linalg.inv(fisher * (block[:, None] == block))


class Recurrence:
    """The paper's static form: v_i = F_{i-1}⁻¹ g_i, F⁻¹x = x/λ - Σ v_i (v_iᵀx)/(m + g_iᵀv_i)."""

    def __init__(self, grads: Tensor, damping: float) -> None:
        self.damping, m = damping, len(grads)
        self.v, self.s = [], []
        for g in grads:
            v = g / damping - sum((u * (u @ g) / s for u, s in zip(self.v, self.s, strict=True)), torch.zeros_like(g))
            self.v.append(v)
            self.s.append(m + g @ v)

    def matvec(self, x: Tensor) -> Tensor:
        return x / self.damping - sum(v * (v @ x) / s for v, s in zip(self.v, self.s, strict=True))

    def diagonal(self) -> Tensor:
        return 1 / self.damping - sum(v**2 / s for v, s in zip(self.v, self.s, strict=True))


def woodfisher(grads: Tensor, damping: float) -> Tensor:
    """WoodFisher: the explicit inverse by m rank-one updates."""
    inverse = torch.eye(grads.shape[1], dtype=grads.dtype) / damping
    for g in grads:
        v = inverse @ g
        inverse = inverse - torch.outer(v, v) / (len(grads) + g @ v)
    return inverse


def gradients(m: int, d: int, seed: int = 0) -> Tensor:
    grads = torch.randn(m, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if m > 4:
        grads[2] = grads[1]  # duplicate
        grads[3] = 0.0
    return grads


SHAPES = {"m<d": (6, 13), "m=d": (8, 8), "m>d": (17, 7)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [None, 1, 3, 5, 100])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_equals_the_dense_inverse(shape, block_size, chunk_size):
    m, d = SHAPES[shape]
    grads = gradients(m, d)
    inverse = FisherInverse.from_gradients(grads, 1e-3, block_size, chunk_size)
    expected = dense_inverse(grads, 1e-3, block_size)
    x, several = torch.randn(d, dtype=torch.float64), torch.randn(d, 3, dtype=torch.float64)
    torch.testing.assert_close(inverse.matvec(x), expected @ x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(inverse.matvec(several), expected @ several, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(inverse.diagonal(), expected.diagonal(), rtol=1e-8, atol=1e-8)
    index = torch.tensor([d - 1, 0, 2, 2, 4])
    torch.testing.assert_close(inverse.submatrix(index), expected[index[:, None], index], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(inverse.entry(1, 2), expected[1, 2], rtol=1e-8, atol=1e-8)
    assert inverse.entry(0, 0) == inverse.submatrix(torch.tensor([0]))[0, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_papers_recurrence_and_woodfisher(shape):
    grads = gradients(*SHAPES[shape])
    inverse, oracle = FisherInverse.from_gradients(grads, 1e-2), Recurrence(grads, 1e-2)
    x = torch.randn(grads.shape[1], dtype=torch.float64)
    torch.testing.assert_close(inverse.matvec(x), oracle.matvec(x))
    torch.testing.assert_close(inverse.diagonal(), oracle.diagonal())
    everything = torch.arange(grads.shape[1])
    torch.testing.assert_close(inverse.submatrix(everything), woodfisher(grads, 1e-2))


def test_block_size_one_is_the_diagonal_fisher():
    grads = gradients(9, 6)
    inverse = FisherInverse.from_gradients(grads, 0.1, block_size=1)
    torch.testing.assert_close(inverse.diagonal(), 1 / (0.1 + grads.square().mean(0)))


@pytest.mark.parametrize("block_size", [None, 4])
def test_symmetric_positive_definite_and_invariant_to_the_order_of_gradients(block_size):
    grads = gradients(10, 12)
    everything = torch.arange(12)
    matrix = FisherInverse.from_gradients(grads, 1e-2, block_size).submatrix(everything)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix)[0] > 0
    other = FisherInverse.from_gradients(grads.flip(0), 1e-2, block_size).submatrix(everything)
    torch.testing.assert_close(matrix, other)


@pytest.mark.parametrize(("block_size", "level"), [(16, 1e-5), (None, 1e-6)])
def test_float32_error_levels(block_size, level):
    """The recurrence in float32 errs by 1e-4 and more here."""
    grads = torch.randn(64, 300, generator=torch.Generator().manual_seed(1)) / 10
    expected = dense_inverse(grads.double(), 1e-5, block_size)
    inverse = FisherInverse.from_gradients(grads, 1e-5, block_size)
    assert inverse.diagonal().dtype == torch.float32
    relative = (inverse.diagonal().double() / expected.diagonal() - 1).abs().max()
    assert relative < level
    x = torch.randn(300, generator=torch.Generator().manual_seed(2))
    exact = expected @ x.double()
    assert (inverse.matvec(x).double() - exact).norm() < level * exact.norm()
    assert inverse.matvec(x).dtype == torch.float32
    assert FisherInverse.from_gradients(grads.bfloat16(), 1e-5, block_size).diagonal().dtype == torch.float32


def test_indefinite_in_float32_is_done_again_in_float64():
    base = 1e3 * torch.randn(1, 8, generator=torch.Generator().manual_seed(3))
    grads = base * (1 + 1e-6 * torch.randn(20, 8, generator=torch.Generator().manual_seed(4)))
    inverse = FisherInverse.from_gradients(grads, 1e-3, block_size=8)
    expected = dense_inverse(grads.double(), 1e-3)
    torch.testing.assert_close(inverse.diagonal().double(), expected.diagonal(), rtol=1e-3, atol=0)
    for block_size in (8, None):
        with pytest.raises(RuntimeError, match=r"not positive definite in float64 with damping=1e-30: raise it"):
            FisherInverse.from_gradients(base.expand(20 if block_size else 5, 8), 1e-30, block_size)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_exact_whatever_the_users_matmul_precision(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with full_precision_products():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_gradients_may_be_memory_mapped(tmp_path):
    grads = gradients(5, 40).float()
    file = torch.from_file(str(tmp_path / "grads"), shared=True, size=grads.numel()).view(grads.shape)
    file.copy_(grads)
    ours = FisherInverse.from_gradients(file, 1e-2, chunk_size=7)
    torch.testing.assert_close(ours.diagonal(), FisherInverse.from_gradients(grads, 1e-2).diagonal())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: FisherInverse.from_gradients(g, 0.0), "damping must be > 0 and finite, got 0"),
        (lambda g: FisherInverse.from_gradients(g, 1.0, block_size=0), "block_size must be >= 1"),
        (lambda g: FisherInverse.from_gradients(g, 1.0, chunk_size=0), "chunk_size must be >= 1"),
        (lambda g: FisherInverse.from_gradients(g[0], 1.0), "grads must be a floating point"),
        (lambda g: FisherInverse.from_gradients(g.long(), 1.0), "grads must be a floating point"),
        (lambda g: FisherInverse.from_gradients(g[:0], 1.0), "grads must be a floating point"),
        (lambda g: FisherInverse.from_gradients(g, 1.0).matvec(g), r"x must have shape \(6,\)"),
        (lambda g: FisherInverse.from_gradients(g, 1.0).entry(0, 6), r"indices must be .* in \[0, 5\]"),
        (lambda g: FisherInverse.from_gradients(g, 1.0).submatrix(torch.tensor(1)), "indices must be a vector"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(gradients(5, 6))


# ---------------------------------------------------------------------------------------------------- collect_gradients


class Batch(NamedTuple):
    x: Tensor
    y: Tensor
    name: str


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 2)).double()


def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
    assert batch.name == "batch"
    return nn.functional.cross_entropy(module(batch.x), batch.y)


def batches(count: int = 3, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(torch.randn(size, 4, dtype=torch.float64, generator=generator), torch.arange(size) % 2, "batch")
        for _ in range(count)
    ]


def expected_gradient(module: nn.Module, batch: Batch, part: slice = slice(None)) -> Tensor:
    module.eval()
    loss = nn.functional.cross_entropy(module(batch.x[part]), batch.y[part])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def test_one_gradient_per_batch_and_nothing_else_changes():
    module = make_module()
    module[4].eval()
    grads = collect_gradients(module, loss_fn, batches(), 5)
    assert [part.training for part in module] == [True, True, True, True, False]
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(module[1].running_mean, torch.zeros(5, dtype=torch.float64))
    data = batches()
    for row, batch in zip(grads, [*data, *data], strict=False):  # the loader starts again
        torch.testing.assert_close(row, expected_gradient(make_module(), batch))


def test_one_gradient_per_sample_by_vmap():
    module = make_module()
    grads = collect_gradients(module, loss_fn, batches(), 14, batch_size_per_grad=1)
    data = batches()
    for i, row in enumerate(grads):
        expected = expected_gradient(make_module(), data[i // 6], slice(i % 6, i % 6 + 1))
        torch.testing.assert_close(row, expected)


def test_batches_cut_into_pieces_leave_out_the_rest():
    grads = collect_gradients(make_module(), loss_fn, batches(), 2, batch_size_per_grad=4)
    data = batches()
    for row, batch in zip(grads, data, strict=False):
        torch.testing.assert_close(row, expected_gradient(make_module(), batch, slice(0, 4)))


def test_chosen_parameters_in_their_order_and_training_mode():
    module = make_module()
    module[4].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2).double())
    torch.manual_seed(2)
    grads = collect_gradients(
        module, loss_fn, batches(), 1, [module[4].weight, unused, module[0].bias], eval_mode=False
    )
    torch.manual_seed(2)
    fresh = make_module()
    torch.manual_seed(2)
    w, b = torch.autograd.grad(loss_fn(fresh, batches()[0]), [fresh[4].weight, fresh[0].bias])
    torch.testing.assert_close(grads[0], torch.cat([w.flatten(), torch.zeros(2).double(), b]))
    assert not torch.equal(module[1].running_mean, torch.zeros(5, dtype=torch.float64))
    assert collect_gradients(module, loss_fn, batches(), 1).shape == (
        1,
        sum(p.numel() for p in module.parameters()) - 2,
    )


def test_dtype_and_iterators_go_on():
    module = make_module()
    iterator: Iterator[Batch] = iter(batches())
    first = collect_gradients(module, loss_fn, iterator, 2, dtype=torch.float32, out_device="cpu")
    assert first.dtype == torch.float32
    second = collect_gradients(module, loss_fn, iterator, 1)
    torch.testing.assert_close(second[0], expected_gradient(make_module(), batches()[2]))
    with pytest.raises(ValueError, match="ended after 0 of num_grads=1 gradients"):
        collect_gradients(module, loss_fn, iterator, 1)
    assert (
        collect_gradients(module.bfloat16(), lambda m, b: m(b.x.bfloat16()).sum(), batches(), 1).dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_grads": 0}, "num_grads must be >= 1, got 0"),
        ({"num_grads": 1, "params": []}, "params must name at least one"),
        ({"num_grads": 1, "batch_size_per_grad": 0}, "batch_size_per_grad must be >= 1"),
        ({"num_grads": 1, "batch_size_per_grad": 7}, "smaller than batch_size_per_grad=7"),
    ],
)
def test_collect_gradients_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        collect_gradients(make_module(), loss_fn, batches(), **arguments)


def test_gradients_keep_the_widest_dtype_of_the_parameters() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(2))
            self.b = nn.Parameter(torch.full((2,), 1 / 3, dtype=torch.float64))

    def loss(module: Mixed, x: Tensor) -> Tensor:
        return (module.a.double() * module.b * x).sum()

    grads = collect_gradients(Mixed(), loss, [torch.ones(1, 2, dtype=torch.float64)], 1)
    assert grads.dtype == torch.float64
    assert torch.equal(grads[0, 2:], torch.ones(2, dtype=torch.float64))
