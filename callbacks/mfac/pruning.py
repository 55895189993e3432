"""Optimal-brain-surgeon pruning with M-FAC's inverse Fisher.

Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS 2021,
arXiv 2107.03356 (static algorithm). With F the empirical Fisher of the kept weights:

- dropping weight q alone, and moving the others to make up for it, raises the loss by ρ_q = w_q² / (2 [F⁻¹]_qq);
- the weights with the smallest ρ are dropped, and the others move by F⁻¹x, x_q = -w_q / [F⁻¹]_qq for dropped q (the
  sum of the single-weight moves);
- on the way to a target this is repeated with new gradients ("recomputations"), which is most of the method's strength.
"""

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from lit_methods.callbacks.mfac.training_gradients import Criterion, check_source, sample_batches, training_gradients
from lit_methods.optim import FisherInverse, collect_gradients
from lit_methods.optim.foundation.private_names import ConvNd

GradientSource = Callable[[int, list[nn.Parameter], Tensor], Tensor]


class MFACPruning(Callback):
    """Prune a network during ``fit``, once or gradually, and keep it pruned under any optimizer.

    At the start of each scheduled epoch the least important weights are set to zero and the others are adjusted. From
    then on their gradients are zeroed before every optimizer step and the weights after it. Optimizer state that is
    shaped like a weight (momenta) is zeroed where weights were dropped, and so are the averages of weights that
    Lightning's ``WeightAveraging``, ``EMAWeightAveraging`` and ``StochasticWeightAveraging`` keep. Works with any
    LightningModule on one device or under DDP, where each rank computes its share of the gradients and all ranks end
    with the same weights.

    The gradients are those of the training loss in evaluation mode, on samples drawn anew from the training dataset;
    logged values, metrics, buffers, ``.grad`` and random number generators are left as they were. Without a Trainer,
    call :meth:`prune`.

    Args:
        target_sparsity: fraction of the prunable weights to drop, in [0, 1), all in epoch 0. Give this or ``schedule``.
        schedule: epoch -> sparsity from the start of that epoch on, not decreasing. An epoch equal to ``max_epochs``
            means after the last one. The official recipes prune every few epochs and drop the learning rate between.
        num_grads: m, gradients per estimate, >= 1; or {current sparsity: m}, to use more as fewer weights remain.
        batch_size: samples per gradient, >= 1.
        damping: λ of the Fisher, > 0.
        block_size: coordinates per diagonal block of the Fisher, >= 1; None: the full matrix (m x m systems instead).
        recomputations: steps on the way to each target, >= 1; the kept fraction shrinks geometrically.
        scope: rank all weights together ("global"), or bring each weight tensor to the same sparsity ("layer").
        update_weights: move the kept weights to make up for the dropped ones.
        parameters: which parameters are prunable, as shell patterns of their names in the module, for example
            ``["encoder.*.weight"]``; None: the weights of all linear and convolution layers.
        criterion: loss of (pl_module, batch); None: what ``training_step`` returns.
        dataloader: batches for the gradients, on each rank its own; None: drawn from the training dataset.
        seed: of the draw, >= 0.

    Attributes:
        masks: parameter name -> bool tensor, True where the weight is kept. Empty before the first ``fit``.

    Raises:
        ValueError: an argument out of range, or parameters that match nothing.
    """

    def __init__(
        self,
        target_sparsity: float | None = None,
        schedule: dict[int, float] | None = None,
        num_grads: int | dict[float, int] = 1024,
        batch_size: int = 32,
        damping: float = 1e-5,
        block_size: int | None = 128,
        recomputations: int = 16,
        scope: Literal["global", "layer"] = "global",
        update_weights: bool = True,
        parameters: list[str] | None = None,
        criterion: Criterion | None = None,
        dataloader: Iterable[Any] | None = None,
        seed: int = 0,
    ) -> None:
        if (target_sparsity is None) == (schedule is None):
            raise ValueError("give either target_sparsity or schedule")
        schedule = {0: target_sparsity} if schedule is None else dict(sorted(schedule.items()))  # type: ignore[dict-item]
        if not schedule or any(epoch < 0 or not 0 <= s < 1 for epoch, s in schedule.items()):
            name = "schedule" if target_sparsity is None else "target_sparsity"
            raise ValueError(f"{name} must hold sparsities in [0, 1) at epochs >= 0, got {target_sparsity or schedule}")
        if sorted(schedule.values()) != list(schedule.values()):
            raise ValueError(f"schedule must not decrease, got {schedule}: pruned weights do not come back")
        num_grads = num_grads if isinstance(num_grads, dict) else {0.0: num_grads}
        if 0 not in num_grads or any(m < 1 or not 0 <= s < 1 for s, m in num_grads.items()):
            raise ValueError(f"num_grads must be >= 1, or a dict with such values from sparsity 0 on, got {num_grads}")
        for name, value in (("batch_size", batch_size), ("recomputations", recomputations), ("block_size", block_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 < damping < float("inf"):
            raise ValueError(f"damping must be > 0 and finite, got {damping}")
        if scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self.schedule = schedule
        self.num_grads = num_grads
        self.batch_size = batch_size
        self.damping = damping
        self.block_size = block_size
        self.recomputations = recomputations
        self.scope = scope
        self.update_weights = update_weights
        self.parameters = parameters
        self.criterion = criterion
        self.dataloader = dataloader
        self.seed = seed
        self.masks: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._done: list[int] = []
        self._handles: list[RemovableHandle] = []

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that are dropped."""
        size = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / size if size else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Masks, and the scheduled epochs that are done."""
        return {"masks": {name: mask.cpu() for name, mask in self.masks.items()}, "done": list(self._done)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the masks of a checkpoint."""
        self.masks = dict(state_dict["masks"])
        self._done = list(state_dict["done"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work."""
        check_source(trainer, pl_module, self.criterion)
        if trainer.max_epochs not in (None, -1) and max(self.schedule) > trainer.max_epochs:
            raise ValueError(f"schedule has epoch {max(self.schedule)}, but max_epochs={trainer.max_epochs}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the prunable weights and watch the optimizers."""
        self._prepare(pl_module)
        self._prune_averages(trainer)
        self._handles = [
            optimizer.register_step_post_hook(lambda *args: self._zero_dropped()) for optimizer in trainer.optimizers
        ]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune when due."""
        self._prune_when_due(trainer, pl_module)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradients of dropped weights."""
        for name, p in self._weights.items():
            if p.grad is not None:
                p.grad.masked_fill_(~self.masks[name], 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log ``train/sparsity``."""
        pl_module.log("train/sparsity", self.sparsity, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if the schedule goes on after the last epoch."""
        self._prune_when_due(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._weights = [], {}

    def prune(
        self,
        module: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        dataloader: Iterable[Any],
        sparsity: float,
    ) -> None:
        """Prune a module here and now, in one process; ``masks`` say what was dropped.

        Args:
            module: the network, changed in place.
            loss_fn: ``loss_fn(module, batch)`` gives the mean loss of a batch.
            dataloader: batches of the size that one gradient is to be taken of; gone through again when it ends.
            sparsity: fraction of the prunable weights that are zero afterwards, in [0, 1).
        """
        batches = _endless(dataloader)
        self._prepare(module)

        def gradients(m: int, params: list[nn.Parameter], kept: Tensor) -> Tensor:
            return collect_gradients(module, loss_fn, batches, m, params, columns=kept)

        self.prune_to(sparsity, gradients)

    def to_torch_pruning(self, module: nn.Module) -> None:
        """Hand the masks over to ``torch.nn.utils.prune``: afterwards ``weight`` = ``weight_orig`` * ``weight_mask``.

        ``torch.nn.utils.prune.remove`` makes it permanent. ``module`` is the one that was pruned, or a copy.
        """
        for name, mask in self.masks.items():
            owner, _, tensor = name.rpartition(".")
            prune.custom_from_mask(module.get_submodule(owner), tensor, mask)

    def _prepare(self, module: nn.Module) -> None:
        if not self.masks:
            if self.parameters is None:
                layers = [(f"{n}.weight" if n else "weight", m) for n, m in module.named_modules()]
                chosen = {name: m.weight for name, m in layers if isinstance(m, nn.Linear | ConvNd)}
                chosen = {name: p for name, p in module.named_parameters() if name in chosen}  # tied weights once
            else:
                patterns = self.parameters
                chosen = {
                    n: p for n, p in module.named_parameters() if any(fnmatch(n, pattern) for pattern in patterns)
                }
            if not chosen:
                raise ValueError(f"parameters={self.parameters} matches no parameter of {type(module).__name__}")
            self.masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in chosen.items()}
        self._weights = {name: module.get_parameter(name) for name in self.masks}
        for name, p in self._weights.items():
            if hasattr(p, "placements") or getattr(p, "_fsdp_flattened", False):
                raise ValueError("MFACPruning needs whole parameters on each rank: use one device or DDP, not FSDP")
            self.masks[name] = self.masks[name].to(p.device)
        self._zero_dropped()

    @torch.no_grad()
    def _zero_dropped(self) -> None:
        for name, p in self._weights.items():
            p.masked_fill_(~self.masks[name], 0)

    def _prune_when_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = [epoch for epoch in self.schedule if epoch <= trainer.current_epoch and epoch not in self._done]
        if not due:
            return
        batches = sample_batches(trainer, self.batch_size, self.seed + due[-1], self.dataloader)

        def gradients(m: int, params: list[nn.Parameter], kept: Tensor) -> Tensor:
            return training_gradients(trainer, pl_module, batches, m, params, self.criterion, kept)

        self.prune_to(self.schedule[due[-1]], gradients, distributed=trainer.world_size > 1)
        self._done += due
        for optimizer in trainer.optimizers:
            for name, p in self._weights.items():
                for value in optimizer.state.get(p, {}).values():
                    if isinstance(value, Tensor) and value.shape == p.shape:
                        value.masked_fill_(~self.masks[name], 0)
        self._prune_averages(trainer)

    @torch.no_grad()
    def _prune_averages(self, trainer: Any) -> None:
        """Zero the dropped weights in averages of weights; later updates mix zeros with zeros."""
        if self not in trainer.callbacks:  # PruningCurve tries it out
            return
        for callback in trainer.callbacks:
            average = getattr(callback, "_average_model", None)  # of Lightning's callbacks
            if isinstance(average, nn.Module):
                module = average.module if isinstance(average, AveragedModel) else average
                for name, mask in self.masks.items():
                    p = module.get_parameter(name)
                    p.masked_fill_(~mask.to(p.device), 0)

    @torch.no_grad()
    def prune_to(self, sparsity: float, gradients: GradientSource, distributed: bool = False) -> None:
        """Drop weights until ``sparsity``, and write masks and weights."""
        weights = self._weights
        mask = torch.cat([self.masks[name].flatten() for name in weights])
        sizes = [p.numel() for p in weights.values()]
        segments = sizes if self.scope == "layer" else [sum(sizes)]
        for targets in self._steps(mask, segments, sparsity):
            kept = mask.nonzero()[:, 0]
            excess = [int(part.sum()) - n for part, n in zip(mask.split(segments), targets, strict=True)]
            if not any(excess):
                continue
            m = max((s, m) for s, m in self.num_grads.items() if s <= 1 - len(kept) / len(mask))[1]
            grads = gradients(m, list(weights.values()), kept)
            inverse = FisherInverse.from_gradients(grads, self.damping, self.block_size)
            diagonal = inverse.diagonal()
            flat = torch.cat([p.flatten() for p in weights.values()])
            w = flat[kept].to(diagonal.dtype)
            dropped = _least(w.square() / (2 * diagonal), mask, segments, excess)
            if self.update_weights:
                w += inverse.matvec(torch.where(dropped, -w / diagonal, 0))
            flat[kept] = w.masked_fill(dropped, 0).to(flat.dtype)
            mask[kept[dropped]] = False
            if distributed:  # ranks must agree even if their arithmetic does not
                dist.broadcast(flat, 0)
                dist.broadcast(mask, 0)
            for p, values in zip(weights.values(), flat.split(sizes), strict=True):
                p.copy_(values.view_as(p))
        for (name, p), part in zip(weights.items(), mask.split(sizes), strict=True):
            self.masks[name] = part.view_as(p)

    def _steps(self, mask: Tensor, segments: list[int], sparsity: float) -> Iterator[list[int]]:
        """Weights to keep in each segment, one list per recomputation; the kept fraction shrinks geometrically."""
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
        now = [int(part.sum()) for part in mask.split(segments)]
        final = [size - round(sparsity * size) for size in segments]
        if any(n < f for n, f in zip(now, final, strict=True)):
            raise ValueError(f"sparsity {sparsity} is below the current {1 - sum(now) / len(mask):.4f}")
        for j in range(1, self.recomputations):
            yield [
                f if f == n else round(n * (f / n) ** (j / self.recomputations))
                for n, f in zip(now, final, strict=True)
            ]
        yield final


def _least(saliency: Tensor, mask: Tensor, segments: list[int], counts: list[int]) -> Tensor:
    """Bool over the kept weights: the ``counts`` least salient of each segment, ties in the order of coordinates."""
    dropped = torch.zeros_like(saliency, dtype=torch.bool)
    start = 0
    for part, count in zip(mask.split(segments), counts, strict=True):
        stop = start + int(part.sum())
        dropped[start + saliency[start:stop].argsort(stable=True)[:count]] = True
        start = stop
    return dropped


def _endless(dataloader: Iterable[Any]) -> Iterator[Any]:
    empty = False
    while not empty:
        empty = True
        for batch in dataloader:
            empty = False
            yield batch
