"""M-FAC: preconditioned SGD with a matrix-free inverse of the empirical Fisher matrix.

Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS 2021,
arXiv 2107.03356 (the dynamic algorithm). The last m gradients are the rows of G; F = λI + GᵀG/m is never formed. The
newest gradient g is itself a row of G, so with A = mλI + GGᵀ the direction is

    u = F⁻¹g = m Gᵀ A⁻¹ e_newest,

two passes over G and one m x m system. This equals the paper's recurrences in exact arithmetic and has none of their
cancellation: they compute (x - almost x)/λ, which in float32 at λ = 1e-5 leaves about 3 % error.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from torch.optim.optimizer import Optimizer, ParamsT

from lit_methods.optim.foundation.finite import warn_of_skipped_step
from lit_methods.optim.foundation.flat import FlatLayout, by_column, by_parameter, is_dtensor, local_grad, local_tensor
from lit_methods.optim.foundation.groups import check_nonnegative, check_own_state, check_positive
from lit_methods.optim.foundation.ranks import world_size
from lit_methods.optim.mfac.window import precondition

__all__ = ["MFAC"]

_HISTORY_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SHARED = ("num_grads", "damping", "window_scale", "solver")  # one Fisher for all groups
_WINDOW = {"history", "row_scale", "gram", "index", "count", "kept", "momentum_buffer"}
_WINDOW |= {"inverse", "inverse_age", "inverse_damping"}  # of solver="rank2"
_COLUMNWISE = ("history", "momentum_buffer")  # state that runs over coordinates in its last dimension
_STORAGE = ("_history_dtype", "_history_device", "_shard_history", "_save_history", "_exclude_zero_weights")


class MFAC(Optimizer):
    r"""SGD preconditioned by the inverse empirical Fisher of the last ``num_grads`` gradients.

    One step, over all parameters of all groups as one vector of d coordinates:

    1. :math:`g = \nabla L + \text{weight\_decay}\cdot p` replaces the oldest row of the window :math:`G`, (m, d);
    2. :math:`u = (\lambda I + G^\top G/m)^{-1} g`, computed as :math:`m\,G^\top (m\lambda I + GG^\top)^{-1} e`;
    3. with momentum :math:`v \leftarrow \beta v + (1-\beta) u,\ u \leftarrow v`; then :math:`p \leftarrow p - lr\,u`.

    The order of these operations is the authors' own. Memory: ``num_grads`` numbers of ``history_dtype`` per parameter
    (plus one scratch number, plus one with momentum). Time: two passes over the window and one m x m float64 solve.

    Host synchronisations on CUDA: none, but for the first step and with ``history_device``. A gradient that is not
    finite (or whose squared norm overflows) never enters the window and its step is skipped, with one warning (on CUDA
    not before the state is saved, since only the device knows); the ring index and the row count live on the device and
    advance by "accepted" (0 or 1), and afterwards everything is as if the step had never been taken.

    Rounding: the Gram matrix is float64, but its entries are dot products of rounded numbers. Each row's damping is
    therefore at least 16 eps sqrt(m) |g|^2, the size of that noise; at smaller dampings the system would not even be
    positive definite. In float64 this never matters.

    Parameters whose gradient is ``None`` contribute zeros and stay where they are, without decay; when no parameter has
    a gradient, the step does nothing. A group added later extends the window by zero columns. Loading a checkpoint
    restores ``num_grads``, ``damping``, ``window_scale``, ``solver`` and the excluded weights with the other
    hyperparameters; the ``history_*`` and ``*_history`` arguments are those of the constructor.

    Several processes: under DDP each rank keeps the whole window, or with ``shard_history`` its share of the columns;
    the ranks then exchange m float64 numbers and all-gather d. DTensor parameters (FSDP2, tensor parallelism) are
    used as local shards, the window is sharded like them, and only the m numbers travel; its state dict is keyed by
    parameter and holds DTensors, as ``torch.distributed.checkpoint`` wants. FSDP1 is refused.

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
            in the direction and halves memory. (It saves no time on a CPU, where rows are cast to be multiplied.)
        history_device: where the window lives and is computed with, for example "cpu" for a window that is larger
            than the accelerator's memory: each step then moves 2 d numbers, and synchronises. None: with the
            parameters. (The host reads its own memory faster than it can feed the window through the bus.)
        window_scale: "full" divides by ``num_grads`` also while the window still holds empty rows (the authors' choice:
            early steps are long); "filled" divides by the number of gradients seen.
        solver: "cholesky" factors the m x m matrix at each step; "rank2" keeps its inverse and exchanges one row and
            column, O(m^2), with a fresh factorisation after every ``num_grads`` steps. Both agree to 1e-6. On a CPU
            with ResNet-20, "rank2" saves a tenth of the step at m = 512; the smaller the network, the more it saves.
        exclude_zero_weights: freeze the weights that are exactly 0 at the first step and keep no history for them: for
            the training of pruned networks. (Zero-initialised biases are such weights too.)
        shard_history: split the window's columns over the ranks of ``process_group``. Saving then needs
            :meth:`consolidate_state_dict` on all ranks first, which Lightning calls by itself.
        process_group: the data-parallel ranks, or with DTensor parameters all ranks that hold a part of the model;
            None for all. Copies and unpickled instances use all.
        save_history: put the window into the state dict: ``num_grads`` times the model. Without it a resumed run
            starts with an empty window, which is not an exact resume.
        maximize: ascend instead of descend.
        foreach: use the multi-tensor kernels; None means True.

    Raises:
        ValueError: a hyperparameter out of range, parameters that are not real floating point, or options that exclude
            one another.
        MemoryError: in the first :meth:`step`, when the window is larger than the free memory.
        RuntimeError: in :meth:`step`, for sparse gradients or FSDP1; in :meth:`state_dict`, for an unconsolidated
            sharded window.
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
        history_device: torch.device | str | None = None,
        window_scale: Literal["full", "filled"] = "full",
        solver: Literal["cholesky", "rank2"] = "cholesky",
        exclude_zero_weights: bool = False,
        shard_history: bool = False,
        process_group: dist.ProcessGroup | None = None,
        save_history: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        if num_grads < 1:
            raise ValueError(f"num_grads must be >= 1, got {num_grads}")
        check_positive(damping=damping)
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
            names = ", ".join(_HISTORY_DTYPES)
            raise ValueError(f"history_dtype must be None or one of {names}, got {history_dtype!r}")
        self._history_dtype = name
        self._history_device = None if history_device is None else torch.device(history_device)
        self._shard_history = shard_history
        self._save_history = save_history
        self._exclude_zero_weights = exclude_zero_weights
        self._group = process_group
        self._layout: FlatLayout | None = None
        self._home: torch.device | None = None
        self._consolidated: Tensor | None = None
        self._skipped: Tensor | None = None
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
        try:
            _check_group(self.param_groups[-1])
            if self._has_dtensors:
                for name in ("_shard_history", "_history_device", "_exclude_zero_weights"):
                    if getattr(self, name):
                        raise ValueError(
                            f"{name[1:]} cannot be combined with DTensor parameters: their window is sharded like "
                            "them; leave it out (for a window in host memory use FSDP2's own CPU offloading)"
                        )
        except ValueError:
            self.param_groups.pop()
            raise
        self._layout = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _STORAGE}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_group", None)
        self._layout = self._skipped = None
        self._consolidated = None

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
        if all(p.grad is None for p in self._params):
            return loss
        self._consolidated = None
        layout, window = self._prepare()
        self._gather(layout)
        direction = layout.mine.to(window["gram"].device)
        shared = self.param_groups[0]
        accepted = precondition(
            direction,
            window,
            damping=shared["damping"],
            filled=shared["window_scale"] == "filled",
            rank2=shared["solver"] == "rank2",
            share=layout.share,
            all_reduce=self._all_reduce if self._sharded or self._has_dtensors else None,
        )
        if direction is not layout.mine:
            layout.mine.copy_(direction)
        if self._sharded:
            dist.all_gather_into_tensor(layout.packed, layout.mine.clone(), group=self._group)
        if layout.kept is not None:
            layout.flat.zero_().index_copy_(0, layout.kept, layout.packed[: layout.columns])
        self._apply(layout, window, accepted)
        self._skipped = ~accepted if self._skipped is None else self._skipped | ~accepted
        if accepted.device.type == "cpu":
            self._warn_of_skipped_steps()
        return loss

    def _warn_of_skipped_steps(self) -> None:
        if self._skipped is not None and bool(self._skipped):
            warn_of_skipped_step(self)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state.

        Raises:
            RuntimeError: the window is sharded and :meth:`consolidate_state_dict` was not called since the last step.
        """
        self._warn_of_skipped_steps()
        result = super().state_dict()
        if "mfac" not in self.state:
            return result
        window = dict(self._window)
        if not self._save_history:
            if self._has_dtensors and "momentum_buffer" not in window:  # torch wants a tensor for every parameter
                window["momentum_buffer"] = window["row_scale"].new_zeros(window["history"].shape[1])
            window = {key: window[key] for key in ("momentum_buffer", "kept") if key in window}
        elif self._sharded:
            if self._consolidated is None:
                raise RuntimeError(
                    "the window is sharded: call consolidate_state_dict() on every rank, then state_dict() on rank 0"
                )
            window["history"] = self._consolidated
        if self._has_dtensors:
            result["state"] = dict(enumerate(by_parameter(window, self._params, _COLUMNWISE)))
        else:
            result["state"] = {**result["state"], "mfac": window}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the tensors are copied, and with ``shard_history`` each rank keeps its own columns.

        Raises:
            ValueError: the saved window does not fit the parameters, or the state is another optimizer's.
        """
        check_own_state(self, state_dict, _WINDOW)
        # The base class casts what is keyed by parameter to the parameter's dtype: keep the window out of its hands.
        super().load_state_dict({**state_dict, "state": {}})
        self.defaults.update({key: self.param_groups[0][key] for key in _SHARED})
        self._layout = self._consolidated = None
        saved = state_dict["state"]
        if not saved:
            return
        if "mfac" in saved and self._has_dtensors:
            raise ValueError(
                "this state was saved without DTensor parameters; save it with torch.distributed.checkpoint"
            )
        if "mfac" in saved:
            window = {k: v.clone() if isinstance(v, Tensor) and k != "history" else v for k, v in saved["mfac"].items()}
        else:
            keys = [key for group in state_dict["param_groups"] for key in group["params"]]
            window = by_column([saved.get(key, {}) for key in keys], self._params, _COLUMNWISE)
        if "history" in window:
            layout = self._lay_out(window.get("kept"))
            columns = window["history"].shape[1]
            if columns != layout.columns:
                raise ValueError(f"the saved window has {columns} coordinates, the parameters have {layout.columns}")
            if self._exclude_zero_weights and "kept" not in window:
                window["kept"] = torch.ones(columns, dtype=torch.bool)
            window["history"] = self._my_columns(window["history"], layout)
        self.state["mfac"] = _OnHost(window) if self._history_device else window

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather a sharded window in the host memory of rank ``to``; a collective call, a no-op when not sharded.

        The copy is dropped by the next step.
        """
        if not (self._sharded and self._save_history and "mfac" in self.state):
            return
        layout, window = self._prepare()
        blocks = [block.cpu() if dist.get_rank(self._group) == to else None for block in self._full_rows(window)]
        if blocks[0] is not None:
            self._consolidated = torch.cat([block for block in blocks if block is not None])[:, : layout.columns]

    @property
    def _params(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _has_dtensors(self) -> bool:
        return any(is_dtensor(p) for p in self._params)

    @property
    def _sharded(self) -> bool:
        return self._shard_history and world_size(self._group) > 1

    @property
    def _window(self) -> dict[str, Any]:
        held = self.state["mfac"]
        return held.window if isinstance(held, _OnHost) else held

    def _lay_out(self, kept: Tensor | None) -> FlatLayout:
        if any(getattr(p, "_fsdp_flattened", False) for p in self._params):
            raise RuntimeError(
                "MFAC cannot see its parameters inside FSDP1; use FSDP2 (fully_shard, Lightning's "
                "ModelParallelStrategy), or DDP with shard_history=True"
            )
        return FlatLayout.of(
            self.param_groups,
            double=self._history_dtype == "float64",
            kept=kept,
            rank=dist.get_rank(self._group) if self._sharded else 0,
            world_size=dist.get_world_size(self._group) if self._sharded else 1,
            share_group=self._group,
        )

    def _prepare(self) -> tuple[FlatLayout, dict[str, Any]]:
        """Layout and window: made at the first step, brought up to date after anything that may have moved them."""
        if "mfac" not in self.state:
            self.state["mfac"] = _OnHost({}) if self._history_device else {}
        window = self._window
        device = local_tensor(self._params[0]).device
        home = self._history_device or device
        if self._layout is not None and self._layout.flat.device == device and window["gram"].device == self._home:
            return self._layout, window

        if self._exclude_zero_weights or "kept" in window:
            mask = torch.cat([p.flatten() != 0 for p in self._params])
            if "kept" in window:
                mask[: len(window["kept"])] = window["kept"].to(mask.device)
            window["kept"] = mask
        layout = self._layout = self._lay_out(window.get("kept"))
        dtype = _HISTORY_DTYPES[self._history_dtype] if self._history_dtype else layout.params_dtype
        rows = self.param_groups[0]["num_grads"]
        width = layout.mine.numel()
        if "history" not in window:
            _check_memory(rows, width, dtype, home)
            window["history"] = torch.zeros(rows, width, dtype=dtype, device=home)
            window["row_scale"] = torch.ones(rows, dtype=torch.float64)
            window["gram"] = torch.zeros(rows, rows, dtype=torch.float64)
            window["index"] = torch.zeros(1, dtype=torch.int64)
            window["count"] = torch.zeros(1, dtype=torch.int64)
        elif window["history"].shape[1] != width:  # a parameter group was added
            blocks = list(self._full_rows(window)) if self._sharded else [window["history"]]
            window["history"] = torch.cat([self._my_columns(block, layout) for block in blocks])
        if "momentum_buffer" in window:
            buffer = window["momentum_buffer"].to(device)
            window["momentum_buffer"] = pad(buffer, (0, layout.bounds[-1][1] - len(buffer)))
        for key in ("row_scale", "gram", "index", "count", "inverse"):
            if key in window:
                window[key] = window[key].to(home)
        window["history"] = window["history"].to(home, dtype)
        self._home = window["gram"].device
        return layout, window

    def _my_columns(self, rows: Tensor, layout: FlatLayout) -> Tensor:
        """This rank's part of full rows, copied; columns that do not exist are zero."""
        width = layout.mine.numel()
        start = dist.get_rank(self._group) * width if self._sharded else 0
        part = rows[:, start : start + width]
        return pad(part, (0, width - part.shape[1])) if part.shape[1] < width else part.clone()

    def _full_rows(self, window: dict[str, Any]) -> Iterator[Tensor]:
        """All ranks' columns of the sharded window, in blocks of rows that take about 64 MB."""
        assert self._layout is not None
        history, world_size = window["history"], dist.get_world_size(self._group)
        for block in history.split(max(1, 2**24 // (world_size * history.shape[1]))):
            part = block.to(self._layout.flat.device).contiguous()
            full = part.new_empty(world_size * len(part), part.shape[1])
            dist.all_gather_into_tensor(full, part, group=self._group)
            yield full.view(world_size, *part.shape).transpose(0, 1).flatten(1)

    def _all_reduce(self, x: Tensor, op: Any) -> Tensor:
        assert self._layout is not None
        result = x.to(self._layout.flat.device)
        dist.all_reduce(result, op=op, group=self._group)
        return result.to(x.device)

    def _gather(self, layout: FlatLayout) -> None:
        """Write the gradients (negated by ``maximize``, plus the coupled decay) into ``layout.packed``."""
        for group, (start, stop), views in zip(self.param_groups, layout.bounds, layout.views, strict=True):
            params, foreach = group["params"], group["foreach"]
            if any(p.grad is not None and p.grad.layout is not torch.strided for p in params):
                raise RuntimeError("MFAC needs dense gradients; build the embedding with sparse=False")
            if any(p.grad is None for p in params):
                layout.flat[start:stop].zero_()
            present = _with_gradient(params, views)
            _copy_([view for _, view in present], [local_grad(p) for p, _ in present], foreach)
            if group["maximize"]:
                layout.flat[start:stop].neg_()
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                _add_([v for _, v in present], [local_tensor(p) for p, _ in present], group["weight_decay"], foreach)
        if layout.kept is not None:
            torch.index_select(layout.flat, 0, layout.kept, out=layout.packed[: layout.columns])

    def _apply(self, layout: FlatLayout, window: dict[str, Any], accepted: Tensor) -> None:
        """Move the parameters along ``layout.flat``, or nowhere (and leave the momentum) when not ``accepted``."""
        for group, (start, stop), views in zip(self.param_groups, layout.bounds, layout.views, strict=True):
            present = _with_gradient(group["params"], views)
            params, changes = [local_tensor(p) for p, _ in present], [view for _, view in present]
            update = layout.flat[start:stop]
            gate = accepted.to(update)
            if group["momentum"]:
                if "momentum_buffer" not in window:
                    window["momentum_buffer"] = torch.zeros_like(layout.flat[: layout.bounds[-1][1]])
                velocity = window["momentum_buffer"][start:stop]
                velocity.lerp_(update, (1 - group["momentum"]) * gate)
                update.copy_(velocity)
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                _add_(changes, params, group["weight_decay"], group["foreach"])
            update.mul_(gate * -group["lr"])
            _add_(params, changes, 1.0, group["foreach"])


def _with_gradient(params: list[Any], views: list[Tensor]) -> list[tuple[Any, Tensor]]:
    return [(p, view) for p, view in zip(params, views, strict=True) if p.grad is not None]


class _OnHost:
    """Keeps the window out of sight of code that moves every tensor in ``Optimizer.state`` to one device."""

    def __init__(self, window: dict[str, Any]) -> None:
        self.window = window


def _check_group(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a one-element tensor, got shape {tuple(lr.shape)}")
    check_nonnegative(lr=lr, weight_decay=group["weight_decay"])
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise ValueError(f"params must be real floating point, got {p.dtype}; view complex parameters as real")


def _check_memory(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    needed = rows * columns * dtype.itemsize
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"the window of num_grads={rows} gradients with {columns} coordinates in {dtype} needs {needed} bytes "
            f"({needed / 2**30:.1f} GiB) on {device}, where {free} are free; lower num_grads, or use "
            "history_dtype='bfloat16', history_device='cpu', or shard_history=True on several ranks"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated, or None where that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return 1024 * int(available.split()[1])
    return None


def _copy_(targets: list[Tensor], sources: list[Tensor], foreach: bool | None) -> None:
    if targets and foreach is not False:
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _add_(targets: list[Tensor], sources: list[Tensor], alpha: float, foreach: bool | None) -> None:
    if targets and foreach is not False:
        torch._foreach_add_(targets, sources, alpha=alpha)
        return
    for target, source in zip(targets, sources, strict=True):
        target.add_(source, alpha=alpha)
