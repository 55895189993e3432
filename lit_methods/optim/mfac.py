"""M-FAC: preconditioned SGD with a matrix-free inverse of the empirical Fisher matrix.

Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS 2021,
arXiv 2107.03356 (the dynamic algorithm). The last m gradients are the rows of G; F = λI + GᵀG/m is never formed. The
newest gradient g is itself a row of G, so with A = mλI + GGᵀ the direction is

    u = F⁻¹g = m Gᵀ A⁻¹ e_newest,

two passes over G and one m x m system. This equals the paper's recurrences in exact arithmetic and has none of their
cancellation: they compute (x - almost x)/λ, which in float32 at λ = 1e-5 leaves about 3 % error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

__all__ = ["MFAC"]

_HISTORY_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SHARED = ("num_grads", "damping", "window_scale", "solver")  # one Fisher for all groups


class MFAC(Optimizer):
    r"""SGD preconditioned by the inverse empirical Fisher of the last ``num_grads`` gradients.

    One step, over all parameters of all groups as one vector of d coordinates:

    1. :math:`g = \nabla L + \text{weight\_decay}\cdot p` replaces the oldest row of the window :math:`G`, (m, d);
    2. :math:`u = (\lambda I + G^\top G/m)^{-1} g`, computed as :math:`m\,G^\top (m\lambda I + GG^\top)^{-1} e`;
    3. with momentum :math:`v \leftarrow \beta v + (1-\beta) u,\ u \leftarrow v`; then :math:`p \leftarrow p - lr\,u`.

    The order of these operations is the authors' own. Memory: ``num_grads`` numbers of ``history_dtype`` per parameter
    (plus one scratch number, plus one with momentum). Time: two passes over the window and one m x m float64 solve.

    Host synchronisations on CUDA: none. A gradient that is not finite (or whose squared norm overflows) never enters
    the window and its step is skipped; since only the device knows, the ring index and the row count live on the device
    and advance by "accepted" (0 or 1), and afterwards everything is as if the step had never been taken.

    Rounding: the Gram matrix is float64, but its entries are dot products of rounded numbers. Each row's damping is
    therefore at least 16 eps sqrt(m) |g|^2, the size of that noise; at smaller dampings the system would not even be
    positive definite. In float64 this never matters.

    Parameters whose gradient is ``None`` contribute zeros; when no parameter has one, the step does nothing.

    Args:
        params: parameters, named parameters or groups. Groups may differ in ``lr``, ``momentum``, ``weight_decay``,
            ``decoupled_weight_decay``, ``maximize`` and ``foreach``; all share one Fisher.
        lr: step size, >= 0. The step's length grows with ``num_grads``, so the two are tuned together.
        momentum: β of the exponential average of the preconditioned gradients, in [0, 1).
        weight_decay: L2 coefficient, >= 0, added to the gradient before it enters the window.
        decoupled_weight_decay: subtract ``lr * weight_decay * p`` instead; the window then holds bare gradients.
        num_grads: m, rows of the window, >= 1.
        damping: λ, > 0.
        history_dtype: "float32", "bfloat16" or "float16" (scaled per row by a power of two), or None for the
            parameters' own dtype. The Fisher is then exactly that of the rounded gradients: bfloat16 costs about 0.2 %
            in the direction and halves memory.
        window_scale: "full" divides by ``num_grads`` also while the window still holds empty rows (the authors' choice:
            early steps are long); "filled" divides by the number of gradients seen.
        solver: "cholesky" factors the m x m matrix at each step; "rank2" keeps its inverse and exchanges one row and
            column, O(m^2), with a fresh factorisation after every ``num_grads`` steps. Both agree to 1e-6.
        maximize: ascend instead of descend.
        foreach: use the multi-tensor kernels; None means True.

    Raises:
        ValueError: a hyperparameter out of range, or parameters that are not real floating point.
        RuntimeError: in :meth:`step`, for sparse gradients.
    """

    state: dict[Any, Any]  # type: ignore[assignment]  # the window is no one parameter's: it has the key "mfac"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        num_grads: int = 1024,
        damping: float = 1e-5,
        *,
        history_dtype: torch.dtype | str | None = None,
        window_scale: Literal["full", "filled"] = "full",
        solver: Literal["cholesky", "rank2"] = "cholesky",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        if num_grads < 1:
            raise ValueError(f"num_grads must be >= 1, got {num_grads}")
        if not damping > 0:
            raise ValueError(f"damping must be > 0, got {damping}")
        if window_scale not in ("full", "filled"):
            raise ValueError(f"window_scale must be 'full' or 'filled', got {window_scale!r}")
        if solver not in ("cholesky", "rank2"):
            raise ValueError(f"solver must be 'cholesky' or 'rank2', got {solver!r}")
        if solver == "rank2" and window_scale == "filled":
            raise ValueError(
                "solver='rank2' needs window_scale='full': while a 'filled' window grows, each step changes the whole "
                "diagonal, which is no rank-2 update; use solver='cholesky'"
            )
        name = None if history_dtype is None else str(history_dtype).removeprefix("torch.")
        if name is not None and name not in _HISTORY_DTYPES:
            raise ValueError(
                f"history_dtype must be None or one of {', '.join(_HISTORY_DTYPES)}, got {history_dtype!r}"
            )
        self._history_dtype = name
        self._layout: _Layout | None = None
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "num_grads": num_grads,
                "damping": damping,
                "window_scale": window_scale,
                "solver": solver,
                "maximize": maximize,
                "foreach": foreach,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the window of past gradients grows by zero columns for its parameters."""
        for key in _SHARED:
            if param_group.get(key, self.defaults[key]) != self.defaults[key]:
                raise ValueError(f"{key} is shared by all parameter groups, got {param_group[key]!r} for one of them")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._layout = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_history_dtype": self._history_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._layout = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the tensors are copied.

        Raises:
            ValueError: the saved window has another number of coordinates than the parameters.
        """
        super().load_state_dict(state_dict)
        self.defaults.update({key: self.param_groups[0][key] for key in _SHARED})
        if "mfac" in self.state:
            saved = self.state["mfac"]
            numel = sum(p.numel() for group in self.param_groups for p in group["params"])
            if saved["history"].shape[1] != numel:
                raise ValueError(
                    f"the saved window has {saved['history'].shape[1]} coordinates, the parameters have {numel}"
                )
            self.state["mfac"] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            return loss
        layout = self._current_layout()
        window = self._current_window(layout)
        self._gather(layout)
        shared = self.param_groups[0]
        accepted = mfac(
            layout.flat,
            window,
            damping=shared["damping"],
            filled=shared["window_scale"] == "filled",
            rank2=shared["solver"] == "rank2",
        )
        self._apply(layout, window, accepted)
        return loss

    def _current_layout(self) -> "_Layout":
        first = self.param_groups[0]["params"][0]
        if self._layout is None or self._layout.flat.device != first.device:
            self._layout = _Layout.of(self.param_groups, _HISTORY_DTYPES.get(self._history_dtype or ""))
        return self._layout

    def _current_window(self, layout: "_Layout") -> dict[str, Any]:
        """The window in ``self.state["mfac"]``, made or brought to the parameters' device and size when it is not."""
        flat, rows = layout.flat, self.param_groups[0]["num_grads"]
        dtype = _HISTORY_DTYPES[self._history_dtype] if self._history_dtype else layout.params_dtype
        window: dict[str, Any] = self.state["mfac"]
        if not window:
            double: dict[str, Any] = {"dtype": torch.float64, "device": flat.device}
            window.update(
                history=torch.zeros(rows, flat.numel(), dtype=dtype, device=flat.device),
                row_scale=torch.ones(rows, **double),
                gram=torch.zeros(rows, rows, **double),
                index=torch.zeros(1, dtype=torch.int64, device=flat.device),
                count=torch.zeros(1, dtype=torch.int64, device=flat.device),
            )
        if any(group["momentum"] for group in self.param_groups) and "momentum_buffer" not in window:
            window["momentum_buffer"] = torch.zeros_like(flat)
        for key in ("history", "momentum_buffer"):
            if key in window and window[key].shape[-1] < flat.numel():
                missing = flat.numel() - window[key].shape[-1]
                window[key] = torch.nn.functional.pad(window[key], (0, missing))
        for key, value in window.items():
            if isinstance(value, Tensor):
                window[key] = value.to(flat.device, dtype if key == "history" else value.dtype)
        return window

    def _gather(self, layout: "_Layout") -> None:
        """Write the gradients (negated by ``maximize``, plus the coupled decay) into ``layout.flat``."""
        for group, (start, stop), views in zip(self.param_groups, layout.bounds, layout.views, strict=True):
            params, foreach = group["params"], group["foreach"]
            if any(p.grad is not None and p.grad.layout is not torch.strided for p in params):
                raise RuntimeError("MFAC needs dense gradients; build the embedding with sparse=False")
            if any(p.grad is None for p in params):
                layout.flat[start:stop].zero_()
            present = [(view, p.grad) for view, p in zip(views, params, strict=True) if p.grad is not None]
            _copy_([view for view, _ in present], [grad for _, grad in present], foreach)
            if group["maximize"]:
                layout.flat[start:stop].neg_()
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                _add_(views, params, group["weight_decay"], foreach)

    def _apply(self, layout: "_Layout", window: dict[str, Any], accepted: Tensor) -> None:
        """Move the parameters along ``layout.flat``, or nowhere (and leave the momentum) when not ``accepted``."""
        for group, (start, stop), views in zip(self.param_groups, layout.bounds, layout.views, strict=True):
            update = layout.flat[start:stop]
            gate = accepted.to(update)
            if group["momentum"]:
                velocity = window["momentum_buffer"][start:stop]
                velocity.lerp_(update, (1 - group["momentum"]) * gate)
                update.copy_(velocity)
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                _add_(views, group["params"], group["weight_decay"], group["foreach"])
            update.mul_(gate * -group["lr"])
            _add_(group["params"], views, 1.0, group["foreach"])


@dataclass
class _Layout:
    """Where each parameter lives in the vector of all coordinates; never saved, rebuilt at need.

    Attributes:
        flat: (d,) scratch in the compute dtype: the gradient on the way in, the update on the way out.
        views: per group, a view of ``flat`` shaped like each parameter.
        bounds: per group, its slice of ``flat``.
        params_dtype: the parameters' (widest) dtype.
    """

    flat: Tensor
    views: list[list[Tensor]]
    bounds: list[tuple[int, int]]
    params_dtype: torch.dtype

    @classmethod
    def of(cls, groups: list[dict[str, Any]], history_dtype: torch.dtype | None) -> "_Layout":
        params = [p for group in groups for p in group["params"]]
        params_dtype = params[0].dtype
        for p in params:
            params_dtype = torch.promote_types(params_dtype, p.dtype)
        double = torch.float64 in (params_dtype, history_dtype)
        flat = torch.zeros(
            sum(p.numel() for p in params), dtype=torch.float64 if double else torch.float32, device=params[0].device
        )
        views: list[list[Tensor]] = []
        bounds: list[tuple[int, int]] = []
        start = 0
        for group in groups:
            first = start
            views.append([])
            for p in group["params"]:
                views[-1].append(flat[start : start + p.numel()].view(p.shape))
                start += p.numel()
            bounds.append((first, start))
        return cls(flat, views, bounds, params_dtype)


def mfac(gradient: Tensor, window: dict[str, Any], *, damping: float, filled: bool, rank2: bool) -> Tensor:
    """Put a gradient into the window and overwrite it with the preconditioned direction.

    Args:
        gradient: (d,) float32 or float64; on return u = (λI + GᵀG/m)⁻¹ gradient, or zeros when not accepted.
        window: ``history`` (m, d), the rows divided by ``row_scale`` (m,); ``gram`` (m, m) of the rows; ``index`` (1,),
            the row to replace; ``count`` (1,), gradients seen; with ``rank2`` also ``inverse`` (m, m).
        damping: λ > 0.
        filled: divide by the number of gradients in the window instead of m.
        rank2: update ``inverse`` instead of factoring.

    Returns:
        One-element bool tensor: whether the gradient was finite. If not, the window is unchanged.
    """
    history, row_scale, gram, index = window["history"], window["row_scale"], window["gram"], window["index"]
    rows = len(gram)
    scale = _power_of_two(gradient) if history.dtype == torch.float16 else gradient.new_ones(1)
    row = (gradient / scale).to(history.dtype)
    stored = row.to(gradient.dtype) * scale  # what the window will hold: the Gram matrix must be of exactly this
    squared_norm = _dots(stored[None], stored)
    accepted = squared_norm.isfinite()
    newest = torch.arange(rows, device=index.device) == index
    products = torch.where(newest, squared_norm, _dots(history, stored) * row_scale)
    products = torch.where(accepted, products, gram.index_select(0, index)[0])

    row_scale.index_copy_(0, index, torch.where(accepted, scale.double(), row_scale.index_select(0, index)))
    history.index_copy_(0, index, torch.where(accepted, row, history.index_select(0, index)))
    gram.index_copy_(0, index, products[None]).index_copy_(1, index, products[:, None])
    window["count"].add_(accepted)

    seen = window["count"].clamp(1, rows) if filled else rows
    noise = 16 * torch.finfo(gradient.dtype).eps * rows**0.5
    ridge = torch.clamp(gram.diagonal() * noise, min=damping * seen)
    weights = _exchange_row(window, ridge, newest, accepted, damping) if rank2 else _solve(gram, ridge, newest)
    _combine(history, weights * row_scale * seen * accepted, out=gradient)
    index.add_(accepted).remainder_(rows)
    return accepted


def _copy_(targets: list[Tensor], sources: list[Tensor], foreach: bool | None) -> None:
    if foreach is not False:
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _add_(targets: list[Tensor], sources: list[Tensor], alpha: float, foreach: bool | None) -> None:
    if foreach is not False:
        torch._foreach_add_(targets, sources, alpha=alpha)
        return
    for target, source in zip(targets, sources, strict=True):
        target.add_(source, alpha=alpha)


def _check_group(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a one-element tensor, got shape {tuple(lr.shape)}")
    if not lr >= 0:
        raise ValueError(f"lr must be >= 0, got {lr}")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {group['weight_decay']}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise ValueError(f"params must be real floating point, got {p.dtype}; view complex parameters as real")


def _power_of_two(x: Tensor) -> Tensor:
    """(1,) scale that brings the largest entry of ``x`` just under 2¹⁵, where float16 keeps most of its range."""
    exponent = torch.frexp(x.abs().amax(0, keepdim=True)).exponent
    return torch.exp2((exponent - 15).clamp(-100, 100).to(x.dtype))


def _chunks(history: Tensor, dtype: torch.dtype) -> range:
    """Column chunks for the passes over the window.

    The dot products of a chunk are summed in ``dtype``, chunks in float64: at 2 million columns this cuts the CPU's
    error from 2e-4 to 1e-6. Low-precision rows are cast chunk by chunk, small enough to stay in cache.
    """
    rows, columns = history.shape
    on_cpu = history.device.type == "cpu"
    if history.dtype == dtype:
        width = 2**15 if on_cpu else 2**20
    else:
        width = max(256, (2**20 if on_cpu else 2**23) // rows)
    return range(0, columns, width)


def _dots(history: Tensor, x: Tensor) -> Tensor:
    """``history @ x`` in float64, shape (m,)."""
    total = torch.zeros(len(history), dtype=torch.float64, device=x.device)
    chunks = _chunks(history, x.dtype)
    for start in chunks:
        part = slice(start, start + chunks.step)
        total += torch.mv(history[:, part].to(x.dtype), x[part])
    return total


def _combine(history: Tensor, weights: Tensor, out: Tensor) -> None:
    """``out = weights @ history`` in ``out``'s dtype, shape (d,)."""
    weights = weights.to(out.dtype)
    chunks = _chunks(history, out.dtype)
    for start in chunks:
        part = slice(start, start + chunks.step)
        torch.mv(history[:, part].to(out.dtype).t(), weights, out=out[part])


def _solve(gram: Tensor, ridge: Tensor, newest: Tensor) -> Tensor:
    """Column ``newest`` of ``(gram + diag(ridge))⁻¹``; of its diagonal alone should it not be positive definite."""
    system = gram + torch.diag(ridge)
    unit = newest.to(gram.dtype)
    factor, info = torch.linalg.cholesky_ex(system)
    return torch.where(info == 0, torch.cholesky_solve(unit[:, None], factor)[:, 0], unit / system.diagonal())


def _inverse(gram: Tensor, ridge: Tensor) -> Tensor:
    """``(gram + diag(ridge))⁻¹``; of its diagonal alone should it not be positive definite."""
    system = gram + torch.diag(ridge)
    factor, info = torch.linalg.cholesky_ex(system)
    return torch.where(info == 0, torch.cholesky_inverse(factor), torch.diag(1 / system.diagonal()))


def _exchange_row(window: dict[str, Any], ridge: Tensor, newest: Tensor, accepted: Tensor, damping: float) -> Tensor:
    """Update ``inverse`` after row and column ``newest`` of the Gram matrix changed; return its column ``newest``.

    The old row and column leave by the formula for the inverse of a principal submatrix, the new ones enter by
    bordering: two rank-1 updates whose pivots, unlike the 2 x 2 determinant of a rank-2 Woodbury step, are bounded
    below by the damping.
    """
    gram, index = window["gram"], window["index"]
    if window.get("inverse_damping") != damping or window["inverse_age"] >= len(gram):
        window.update(inverse=_inverse(gram, ridge), inverse_damping=damping, inverse_age=0)
        return window["inverse"].index_select(1, index)[:, 0]
    window["inverse_age"] += 1
    inverse = window["inverse"]
    leaving = inverse.index_select(1, index)[:, 0]
    rest = torch.addr(inverse, leaving, leaving / leaving.index_select(0, index), alpha=-1)
    entering = gram.index_select(0, index)[0].masked_fill(newest, 0)
    projection = rest.mv(entering).masked_fill(newest, 0)
    for _ in range(2):  # iterative refinement: without it the errors of one exchange are amplified by the next
        remainder = entering - gram.mv(projection) - ridge * projection
        projection += rest.mv(remainder.masked_fill(newest, 0)).masked_fill(newest, 0)
    floor = ridge.index_select(0, index)
    pivot = gram.diagonal().index_select(0, index) + floor - entering.dot(projection)
    residual = newest.to(gram.dtype) - projection
    column = residual / torch.maximum(pivot, floor)
    torch.where(accepted, torch.addr(rest, residual, column), inverse, out=inverse)
    return column
