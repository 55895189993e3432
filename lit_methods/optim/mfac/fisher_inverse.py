"""Static M-FAC: products with, and entries of, the inverse of a damped empirical Fisher matrix.

Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS 2021,
arXiv 2107.03356 (the static algorithm). Given m gradients, the rows of G (m, d), F = λI + GᵀG/m, or only its diagonal
blocks. The paper adds one gradient after the other (m rank-one updates of length d). The same numbers come from one
factorisation and matrix products:

- blocks of b <= m coordinates: invert the b x b blocks (the same result as WoodFisher, arXiv 2004.14340);
- larger ones, and the full matrix: with L Lᵀ = mλI + GGᵀ and V = L⁻¹G, F⁻¹ = (I - VᵀV)/λ.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods.optim.foundation.groups import check_positive
from lit_methods.optim.foundation.private_names import tree_leaves, tree_map
from lit_methods.optim.mfac.window import full_precision_products

__all__ = ["FisherInverse", "collect_gradients"]


class FisherInverse:
    """F⁻¹ for F = λI + GᵀG/m, or for the diagonal blocks of that. Build it with :meth:`from_gradients`.

    Blocks of at most m coordinates are multiplied in the dtype of the gradients (float32 at least), inverted in
    float64 and stored: d * block_size numbers. For larger ones only the m x m factors are stored, and every question
    is answered from the gradients, in float64 and chunk by chunk, because F⁻¹x is the small difference of two large
    vectors there.
    """

    def __init__(self, grads: Tensor, damping: float, block_size: int, chunk_size: int, device: torch.device) -> None:
        self.damping = damping
        self.block_size = block_size
        self._grads = grads
        self._chunk_size = chunk_size
        self._device = device
        self._dtype = torch.promote_types(grads.dtype, torch.float32)
        self._inverses: Tensor | None = None  # (blocks, b, b) if b <= m; the last one padded by zero gradients
        self._factors: list[Tensor] = []  # else for each block the L (m, m) of the text above

    @classmethod
    def from_gradients(
        cls,
        grads: Tensor,
        damping: float,
        block_size: int | None = None,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> "FisherInverse":
        """Factor F.

        Args:
            grads: (m, d) floating point, one gradient per row. It may be memory-mapped; when ``block_size > m`` it is
                kept (not copied) and must not change.
            damping: λ > 0.
            block_size: coordinates per diagonal block, >= 1; the last block may be smaller. None: the full matrix.
            chunk_size: columns worked on at a time, >= 1; None: as many as make 8 MB on the CPU, 128 MB elsewhere.
            device: where to compute and where results live; None: with ``grads``.

        Raises:
            ValueError: an argument out of range.
            RuntimeError: F is not positive definite in float64.
        """
        if grads.dim() != 2 or not grads.is_floating_point() or grads.numel() == 0:
            raise ValueError(f"grads must be a floating point (m, d) matrix, got {grads.dtype} {tuple(grads.shape)}")
        check_positive(damping=damping)
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size must be >= 1, or None for the full matrix, got {block_size}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be >= 1 or None, got {chunk_size}")
        rows, columns = grads.shape
        block = min(block_size or columns, columns)
        device = torch.device(device or grads.device)
        chunk = chunk_size or max(1, (2**20 if device.type == "cpu" else 2**24) // rows)
        self = cls(grads.detach(), damping, block, chunk, device)
        if block <= rows:
            chunks = self._chunks(range(columns), self._dtype, max(1, chunk // block) * block)
            self._inverses = torch.cat([self._invert_blocks(part) for _, part in chunks])
        else:
            self._factors = [self._factor(inside) for inside in self._blocks()]
        return self

    def matvec(self, x: Tensor) -> Tensor:
        """F⁻¹x for one vector (d,) or several (d, k), in the dtype of ``x``."""
        if x.dim() not in (1, 2) or len(x) != self._grads.shape[1]:
            raise ValueError(f"x must have shape ({self._grads.shape[1]},) or (.., k), got {tuple(x.shape)}")
        vectors = x.to(self._device).reshape(len(x), -1)
        if self._inverses is not None:
            padded = vectors.new_zeros(len(self._inverses) * self.block_size, vectors.shape[1], dtype=self._dtype)
            padded[: len(x)] = vectors
            with full_precision_products():
                result = self._inverses.bmm(padded.view(len(self._inverses), self.block_size, -1)).flatten(0, 1)
            return result[: len(x)].reshape(x.shape).to(x.dtype)
        result = torch.empty_like(vectors)
        for inside, factor in zip(self._blocks(), self._factors, strict=True):
            products = torch.zeros(len(factor), vectors.shape[1], dtype=torch.float64, device=self._device)
            for columns, part in self._chunks(inside):
                products.addmm_(part, vectors[columns].double())
            weights = torch.cholesky_solve(products, factor)
            for columns, part in self._chunks(inside):
                result[columns] = ((vectors[columns].double() - part.t() @ weights) / self.damping).to(x.dtype)
        return result.reshape(x.shape)

    def diagonal(self) -> Tensor:
        """The diagonal of F⁻¹, (d,)."""
        if self._inverses is not None:
            return self._inverses.diagonal(dim1=1, dim2=2).flatten()[: self._grads.shape[1]]
        result = torch.empty(self._grads.shape[1], dtype=self._dtype, device=self._device)
        for inside, factor in zip(self._blocks(), self._factors, strict=True):
            for columns, part in self._chunks(inside):
                v = torch.linalg.solve_triangular(factor, part, upper=False)
                result[columns] = ((1 - v.square().sum(0)) / self.damping).to(self._dtype)
        return result

    def entry(self, i: int, j: int) -> Tensor:
        """[F⁻¹]_ij, a 0-dim tensor."""
        return self.submatrix(torch.tensor([i, j]))[0, 1]

    def submatrix(self, indices: Tensor) -> Tensor:
        """Rows and columns ``indices`` (k,) of F⁻¹, (k, k)."""
        d = self._grads.shape[1]
        if indices.dim() != 1 or ((indices < 0) | (indices >= d)).any():
            raise ValueError(f"indices must be a vector of integers in [0, {d - 1}], got {indices}")
        indices = indices.to(self._device)
        block, place = indices // self.block_size, indices % self.block_size
        if self._inverses is not None:
            values = self._inverses[block[:, None], place[:, None], place]
        else:
            chosen = self._grads[:, indices.to(self._grads.device)].to(self._device, torch.float64)
            values = torch.zeros(len(indices), len(indices), dtype=torch.float64, device=self._device)
            for b in block.unique().tolist():
                v = torch.linalg.solve_triangular(self._factors[b], chosen, upper=False)
                values = torch.where(block == b, v.t() @ v, values)
            values = ((indices[:, None] == indices).double() - values) / self.damping
        return (values * (block[:, None] == block)).to(self._dtype)

    def _blocks(self) -> list[range]:
        d = self._grads.shape[1]
        return [range(start, min(start + self.block_size, d)) for start in range(0, d, self.block_size)]

    def _chunks(
        self, inside: range, dtype: torch.dtype = torch.float64, width: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of the columns ``inside`` of the gradients, on the computing device."""
        width = width or self._chunk_size
        for start in range(inside.start, inside.stop, width):
            columns = slice(start, min(start + width, inside.stop))
            yield columns, self._grads[:, columns].to(self._device, dtype)

    def _invert_blocks(self, part: Tensor) -> Tensor:
        """(blocks, b, b) inverses for the columns ``part`` (m, blocks * b), which may lack some at the end."""
        missing = -part.shape[1] % self.block_size
        part = nn.functional.pad(part, (0, missing)) if missing else part
        grads = part.reshape(len(part), -1, self.block_size).transpose(0, 1)
        with full_precision_products():
            fisher = torch.bmm(grads.transpose(1, 2), grads).double() / len(part)
        fisher.diagonal(dim1=1, dim2=2).add_(self.damping)
        factors, info = torch.linalg.cholesky_ex(fisher)
        if info.any():
            if part.dtype == torch.float64:
                raise self._indefinite()
            return self._invert_blocks(part.double()).to(part.dtype)
        return torch.cholesky_inverse(factors).to(part.dtype)

    def _factor(self, inside: range) -> Tensor:
        """Cholesky factor of mλI + GGᵀ for the columns ``inside``."""
        rows = len(self._grads)
        gram = (rows * self.damping) * torch.eye(rows, dtype=torch.float64, device=self._device)
        for _, part in self._chunks(inside):
            gram.addmm_(part, part.t())
        factor, info = torch.linalg.cholesky_ex(gram)
        if info:
            raise self._indefinite()
        return factor

    def _indefinite(self) -> RuntimeError:
        return RuntimeError(
            f"F is not positive definite in float64 with damping={self.damping}: raise it (or a gradient is not finite)"
        )


def collect_gradients(
    module: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    dataloader: Iterable[Any],
    num_grads: int,
    params: Iterable[nn.Parameter] | None = None,
    *,
    columns: Tensor | None = None,
    batch_size_per_grad: int | None = None,
    eval_mode: bool = True,
    out_device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradients of the loss on ``num_grads`` mini-batches or samples, one per row.

    ``.grad`` fields and the modes of the module's parts are left as they were.

    Args:
        module: the network; batches are moved to its parameters' device.
        loss_fn: ``loss_fn(module, batch)`` gives the mean loss of a batch, a scalar.
        dataloader: batches (any nesting of tensors with the samples in dimension 0); started again when it ends, an
            iterator goes on where it stands.
        num_grads: rows wanted, >= 1.
        params: which parameters of ``module``, in this order; None: all that require gradients.
        columns: indices of the coordinates to keep of each gradient; None: all d.
        batch_size_per_grad: samples per gradient. None: one gradient per batch of the dataloader. 1: per-sample
            gradients by ``torch.func`` (``vmap`` of ``grad``, so no batch norm in training mode). Otherwise batches are
            cut, and what is left over at their ends is not used.
        eval_mode: put the module into evaluation mode meanwhile.
        out_device: where the result lives; None: with the parameters.
        dtype: of the result; None: the widest of the parameters' (float32 at least).

    Returns:
        (num_grads, d or len(columns)), in the order of ``params``; parameters that the loss does not use have zeros.

    Raises:
        ValueError: an argument out of range, or the dataloader gave too little.
    """
    chosen = [p for p in module.parameters() if p.requires_grad] if params is None else list(params)
    if not chosen:
        raise ValueError("params must name at least one parameter that requires a gradient")
    if num_grads < 1:
        raise ValueError(f"num_grads must be >= 1, got {num_grads}")
    if batch_size_per_grad is not None and batch_size_per_grad < 1:
        raise ValueError(f"batch_size_per_grad must be >= 1, or None for whole batches, got {batch_size_per_grad}")
    device = chosen[0].device
    if dtype is None:
        dtype = torch.float32
        for p in chosen:
            dtype = torch.promote_types(dtype, p.dtype)
    width = sum(p.numel() for p in chosen) if columns is None else len(columns)
    result = torch.empty(num_grads, width, dtype=dtype, device=out_device or device)
    filled = 0
    with _evaluation_mode(module, eval_mode), torch.enable_grad():
        while filled < num_grads:
            before = filled
            for batch in dataloader:
                batch = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
                for rows in _batch_gradients(module, loss_fn, batch, chosen, batch_size_per_grad):
                    rows = rows[: num_grads - filled]
                    rows = rows if columns is None else rows[:, columns]
                    result[filled : filled + len(rows)] = rows
                    filled += len(rows)
                    if filled == num_grads:
                        return result
            if filled == before:
                raise ValueError(
                    f"the dataloader ended after {filled} of num_grads={num_grads} gradients: it is empty, a used-up "
                    f"iterator, or its batches are smaller than batch_size_per_grad={batch_size_per_grad}"
                )
    return result


def _batch_gradients(
    module: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    params: list[nn.Parameter],
    samples: int | None,
) -> Iterator[Tensor]:
    """The gradients of one batch, (n, d) at a time."""
    if samples == 1:
        yield _sample_gradients(module, loss_fn, batch, params)
        return
    size = next(len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim())
    samples = samples or size
    for start in range(0, size - samples + 1, samples):
        part = slice(start, start + samples)
        piece = tree_map(lambda x, part=part: x[part] if isinstance(x, Tensor) and x.dim() else x, batch)
        loss = loss_fn(module, piece)
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        yield torch.cat([g.flatten() for g in grads])[None]


def _sample_gradients(
    module: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, params: list[nn.Parameter]
) -> Tensor:
    """One gradient per sample, (n, d)."""
    names = {p: name for name, p in module.named_parameters()}
    values = {f"module.{names[p]}": p.detach() for p in params}
    loss_module = _Loss(module, loss_fn)

    def loss(values: dict[str, Tensor], sample: Any) -> Tensor:
        alone = tree_map(lambda x: x[None] if isinstance(x, Tensor) else x, sample)
        return torch.func.functional_call(loss_module, values, (alone,))

    per_sample = tree_map(lambda x: 0 if isinstance(x, Tensor) and x.dim() else None, batch)
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, per_sample), randomness="different")(values, batch)
    return torch.cat([g.flatten(1) for g in grads.values()], dim=1)


class _Loss(nn.Module):
    """The loss as a module's forward, which is what ``functional_call`` takes."""

    def __init__(self, module: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.module, batch)


@contextmanager
def _evaluation_mode(module: nn.Module, wanted: bool) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    if wanted:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
