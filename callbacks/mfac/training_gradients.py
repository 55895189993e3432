"""Gradients of a module's training loss on fresh samples, taken in the middle of a run without disturbing it."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric

from lit_methods.optim import collect_gradients

Criterion = Callable[[LightningModule, Any], Tensor]


def check_source(trainer: Trainer, pl_module: LightningModule, criterion: Criterion | None) -> None:
    """Refuse what gradients cannot be taken of.

    Raises:
        ValueError: a module with manual optimization (whose ``training_step`` takes optimizer steps) and no criterion.
    """
    if criterion is None and not pl_module.automatic_optimization:
        raise ValueError(
            f"{type(pl_module).__name__} optimizes manually, so its training_step cannot be asked for a loss: pass "
            "criterion, a function of (pl_module, batch)"
        )


def sample_batches(
    trainer: Trainer, batch_size: int, seed: int, dataloader: Iterable[Any] | None = None
) -> Iterator[Any]:
    """Endless batches, on the module's device: different ones on each rank.

    Args:
        trainer: a running ``fit``.
        batch_size: samples per batch, of the training loader's dataset in random order.
        seed: of that order.
        dataloader: take its batches instead, over and over.

    Raises:
        ValueError: the training loader has no dataset to draw from.
    """
    if dataloader is None:
        loader = trainer.train_dataloader
        if (
            not isinstance(loader, DataLoader)
            or isinstance(loader.dataset, IterableDataset)
            or not loader._auto_collation
        ):
            raise ValueError(
                f"samples can only be drawn from one DataLoader over a map-style dataset, not {type(loader).__name__}: "
                "pass dataloader, an iterable of batches"
            )
        size = len(loader.dataset)  # type: ignore[arg-type]
        order = _endless_order(size, seed, trainer.global_rank, trainer.world_size)
        dataloader = DataLoader(
            loader.dataset,
            batch_size,
            sampler=order,
            collate_fn=loader.collate_fn,
            generator=torch.Generator(),  # else it draws from the global one
        )
    while True:
        for batch in dataloader:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.lightning_module._on_before_batch_transfer(batch)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def training_gradients(
    trainer: Trainer,
    pl_module: LightningModule,
    batches: Iterator[Any],
    num_grads: int,
    params: list[nn.Parameter],
    criterion: Criterion | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Gradients of the mean loss of the next batches, in evaluation mode, the same on all ranks.

    Args:
        trainer: a running ``fit``.
        pl_module: the module.
        batches: see :func:`sample_batches`.
        num_grads: rows wanted; on R ranks it is rounded up to a multiple of R, and each rank computes its share.
        params: the parameters, in order.
        criterion: gives the loss of (module, batch); None: the module's ``training_step``.
        columns: indices of the coordinates wanted; None: all.

    Returns:
        (num_grads, coordinates), float32 or wider.
    """
    exact = trainer.precision == "16-mixed"  # without a loss scale float16 gradients would underflow
    context = nullcontext if exact else trainer.precision_plugin.train_step_context

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        with context():
            return (criterion or _training_loss)(pl_module, batch)

    world_size = trainer.world_size
    with _undisturbed(pl_module):
        grads = collect_gradients(pl_module, loss_fn, batches, -(-num_grads // world_size), params, columns=columns)
    if world_size == 1:
        return grads
    everywhere = grads.new_empty(world_size * len(grads), grads.shape[1])
    dist.all_gather_into_tensor(everywhere, grads)
    return everywhere


def _endless_order(size: int, seed: int, rank: int, world_size: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    place = 0
    while True:
        for index in torch.randperm(size, generator=generator).tolist():
            if place % world_size == rank:
                yield index
            place += 1


def _training_loss(pl_module: LightningModule, batch: Any) -> Tensor:
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1
    output = pl_module.training_step(batch, 0) if takes_index else pl_module.training_step(batch)
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"training_step returned {type(output).__name__}, not a loss: pass criterion")
    return loss


@contextmanager
def _undisturbed(pl_module: LightningModule) -> Iterator[None]:
    """Take back what a ``training_step`` leaves behind: logged values, metrics, buffers, random numbers."""
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
    metrics = [(m, _metric_state(m)) for m in pl_module.modules() if isinstance(m, Metric)]
    pl_module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        with isolate_rng():
            yield
    finally:
        del pl_module.log
        for buffer, before in buffers:
            buffer.copy_(before)
        for metric, state in metrics:
            vars(metric).update(state)


def _metric_state(metric: Metric) -> dict[str, Any]:
    state = {name: list(x) if isinstance(x, list) else x.clone() for name, x in metric.metric_state.items()}
    return state | {name: vars(metric)[name] for name in ("_update_count", "_computed", "_forward_cache")}
