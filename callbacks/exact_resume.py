"""Resuming that cannot be told from never having stopped."""

import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchmetrics import Metric, MetricCollection

from lit_methods.optim.foundation.ranks import gather_objects
from lit_methods.precision import convert_to_precision

# Where in an epoch a checkpoint was written, as far as what is still to be done there depends on it.
_AFTER_STEP = "after a step"  # a validation may be due
_AFTER_VALIDATION = "after a validation"
_AT_EPOCH_END = "at the end of an epoch"
_BETWEEN_EPOCHS = "between epochs"


class ExactResume(Callback):
    """Make ``Trainer.fit(..., ckpt_path=...)`` continue bit for bit where the checkpoint was written.

    Add it to the Trainer's callbacks, in the run that writes checkpoints and in the run that resumes. Then a resumed
    run takes the same batches, draws the same random numbers and ends with the same weights, optimizer state and
    logged values as a run that was never stopped, on the CPU and, as far as the kernels are deterministic, on GPUs. It
    does not matter when the checkpoint was written: after any step, after a validation, at the end of an epoch, when
    ``max_steps`` ended an epoch early, or after ``fit``.

    Lightning 2.6 saves weights, optimizers, schedulers, callbacks and loop counters. This callback adds, for every rank
    (Lightning saves rank zero's state only): the states of the random number generators (torch, the rank's CUDA device,
    Python, NumPy's global one), of the training loaders, of the module's torchmetrics and of running means from
    ``self.log(..., on_epoch=True)``. It restores them last, when training starts. It also repairs what Lightning does
    with a checkpoint:

    - written at an epoch's last step: the validation and the end of that epoch are lost, another epoch is skipped;
    - written at an epoch's end, and ``max_steps`` is set: the epochs' numbers and orders shift;
    - written before a validation within an epoch: that validation is left out;
    - ``configure_optimizers`` asks for ``estimated_stepping_batches``: the epoch starts anew with the loader;
    - written at an epoch's end: streams that go on across epochs (environments, replay buffers) start anew;
    - ``precision="64-true"``: weights come back rounded to float32, also in ``validate``, ``test`` and ``predict``;
    - loaders have worker processes: they fetch ahead in the order of epoch 0;
    - ``ReduceLROnPlateau``: not stepped at the end of the resumed epoch;
    - ``ModelCheckpoint`` in a new log folder, or from another working folder, forgets which models were the best so far
      (their files must still exist, where they were or beside the checkpoint);
    - the state of another kind of optimizer is loaded without a word.

    What it needs from you (our datamodules and recipes have it; it warns when it sees that something is missing):

    - training loaders are ``torchdata.stateful_dataloader.StatefulDataLoader`` with a sampler of their own whose order
      depends on seed and epoch only, e.g. :class:`lit_methods.datamodules.tensors.ShuffledSampler`, and the Trainer has
      ``use_distributed_sampler=False``; an iterable dataset has a length and keeps its place in its ``state_dict``;
    - fetching a sample draws no random numbers: augment in ``on_after_batch_transfer``;
    - every other state (a generator of your own, a replay buffer) is in a ``state_dict`` or ``on_save_checkpoint``;
    - ``on_train_start`` hooks draw no random numbers.

    Limits: on another number of ranks a run goes on with a warning, since every rank then sees other data; from a
    checkpoint of an epoch's last step, that epoch's training means are not logged; gradients accumulated so far are not
    saved (``ModelCheckpoint`` writes after optimizer steps, unless by ``train_time_interval``); time-based validation
    intervals depend on the clock.
    """

    def __init__(self) -> None:
        self._ranks: list[dict[str, Any]] = []  # what was saved or loaded last, by rank
        self._restoring: dict[str, Any] | None = None  # what this rank still has to restore
        self._where = _BETWEEN_EPOCHS
        self._final: list[dict[str, Any]] | None = None  # the state when training ended
        self._kinds: dict[str, Any] = {}  # precision and optimizers of the run that wrote the checkpoint
        self._buffers: dict[str, Tensor] = {}  # of the checkpoint, which may be wider than the Trainer's precision
        self._optimizers: tuple[list[str] | None, list[dict[str, Any]] | None] = None, None  # of the checkpoint
        self._means: dict[str, dict[str, Tensor]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every rank as it was saved or loaded last."""
        return {"ranks": self._ranks, **self._kinds} if self._ranks else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of every rank; :meth:`on_train_start` puts it in force."""
        self._ranks = state_dict["ranks"]
        self._kinds = {key: value for key, value in state_dict.items() if key != "ranks"}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the module to the Trainer's precision; Lightning would do it after it has loaded a checkpoint."""
        convert_to_precision(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gather the state of every rank into the checkpoint."""
        self._ranks = self._final or gather_objects(_capture(trainer, pl_module))
        self._kinds = {"precision": trainer.precision, "optimizers": [type(o).__qualname__ for o in trainer.optimizers]}
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Pick this rank's state and tell Lightning's loops where the checkpoint was written."""
        state = checkpoint["callbacks"].get(self.state_key)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if state is not None and state.get("precision") == trainer.precision:
            # Callbacks that average weights put the average into "state_dict"; shards are not in the checkpoint.
            average = checkpoint.get("state_dict", {})
            weights = checkpoint.get("current_model_state", average) if fitting else average
            self._buffers = {name: weights[name] for name, _ in pl_module.named_buffers() if name in weights}
        if not fitting:
            return
        _keep_best_models(trainer, checkpoint)
        self._optimizers = (state or {}).get("optimizers"), checkpoint.get("optimizer_states")
        if state is None:
            rank_zero_warn("The checkpoint was written without ExactResume: the resumed run will differ.")
            return
        ranks = state["ranks"]
        if len(ranks) == trainer.world_size:
            self._restoring = ranks[trainer.global_rank]
        else:
            rank_zero_warn(
                f"The checkpoint was written on {len(ranks)} ranks and is resumed on {trainer.world_size}: the run "
                "goes on from the same step of the epoch, but its data and random numbers will differ."
            )
            self._restoring = {key: ranks[0][key] for key in ("loaders", "callback_metrics")}
        self._where = _rewind(checkpoint["loops"]["fit_loop"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse the states of other optimizers, and restore wide buffers."""
        check_optimizers(trainer, *self._optimizers)
        self._optimizers = None, None
        self._widen_buffers(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore wide buffers."""
        self._widen_buffers(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def _widen_buffers(self, pl_module: LightningModule) -> None:
        """Give back what converting the module to a narrow precision took; a run may keep sums in a wider one."""
        buffers, self._buffers = self._buffers, {}
        for name, saved in buffers.items():
            owner, _, key = name.rpartition(".")
            now = pl_module.get_buffer(name)
            if saved.is_floating_point() and saved.element_size() > now.element_size():
                setattr(pl_module.get_submodule(owner), key, saved.to(now.device))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore everything, or say what the loaders lack."""
        self._final = None
        state, self._restoring = self._restoring, None
        within_epoch = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if state is not None:
            trainer.callback_metrics.update(state["callback_metrics"])
            _resume_loops(trainer, self._where, state["loaders"])
        _check_loaders(trainer)
        _check_lengths(trainer)
        if state is not None and "rng" in state:
            _restore_metrics(pl_module, state["metrics"], within_epoch)
            self._means = state["means"] if within_epoch else {}
            restore_rng(state["rng"], trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add the running means of the epoch before the checkpoint; Lightning makes theirs at the first ``log``."""
        if self._means:
            _add_means(trainer, self._means)
            self._means = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the restart here: Lightning would not step ``ReduceLROnPlateau`` in an epoch that was resumed."""
        for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop):
            loop.on_iteration_done()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the state for ``save_checkpoint`` after ``fit``: the loaders are about to be reset."""
        self._final = gather_objects(_capture(trainer, pl_module))


def _capture(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return this rank's state as tensors on the CPU and plain data, which ``weights_only=True`` loads."""
    results = trainer.fit_loop.epoch_loop._results
    return {
        "rng": capture_rng(trainer.strategy.root_device),
        "loaders": [loader.state_dict() for loader in _train_loaders(trainer) if hasattr(loader, "state_dict")],
        "callback_metrics": {name: value.cpu() for name, value in trainer.callback_metrics.items()},
        "metrics": _capture_metrics(pl_module, {id(r.value) for r in results.values() if not r.is_tensor}),
        "means": {
            key: {name: value.cpu() for name, value in mean.metric_state.items()}
            for key, mean in results.items()
            if mean.is_tensor and mean.meta.on_epoch and not mean.has_reset
        },
    }


def capture_rng(device: torch.device) -> dict[str, Any]:
    """States of the global generators of Python, NumPy, torch and ``device``, as what ``weights_only`` loads."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    assert (version, name) == (3, "MT19937")
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python_gauss": gauss,
        "numpy": torch.from_numpy(np.asarray(keys, np.int64)),
        "numpy_place": (int(position), int(has_gauss), float(cached_gauss)),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what :func:`capture_rng` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate((3, tuple(state["python"].tolist()), state["python_gauss"]))
    np.random.set_state(("MT19937", state["numpy"].numpy(), *state["numpy_place"]))  # noqa: NPY002
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _capture_metrics(pl_module: LightningModule, logged: set[int]) -> dict[str, Any]:
    """Return the states of the module's metrics; those ``logged`` (by id) are reset by Lightning after each epoch."""
    for module in pl_module.modules():
        if isinstance(module, MetricCollection):
            module.items()  # members of one compute group share a state; this brings them all up to date
    return {
        name: {
            "logged": id(metric) in logged,
            "updates": metric.update_count,
            "state": {
                key: [item.cpu() for item in value] if isinstance(value, list) else value.cpu()
                for key, value in metric.metric_state.items()
            },
        }
        for name, metric in pl_module.named_modules()
        if isinstance(metric, Metric) and metric.update_called
    }


def _restore_metrics(pl_module: LightningModule, saved: dict[str, Any], within_epoch: bool) -> None:
    for name, metric in pl_module.named_modules():
        if isinstance(metric, Metric) and name in saved and (within_epoch or not saved[name]["logged"]):
            for key, value in saved[name]["state"].items():
                on_device = [i.to(metric.device) for i in value] if isinstance(value, list) else value.to(metric.device)
                setattr(metric, key, on_device)
            metric._update_count = saved[name]["updates"]
            metric._computed = None


def _add_means(trainer: Trainer, saved: dict[str, dict[str, Tensor]]) -> None:
    for key, mean in trainer.fit_loop.epoch_loop._results.items():
        if key in saved and mean.is_tensor and not mean.has_reset:
            before = {name: value.to(mean.value.device) for name, value in saved[key].items()}
            if mean.meta.is_max_reduction or mean.meta.is_min_reduction:
                mean.value = mean.meta.reduce_fx(before["value"], mean.value)
            else:
                mean.value = before["value"] + mean.value
            if mean.meta.is_mean_reduction:
                mean.cumulated_batch_size = before["cumulated_batch_size"] + mean.cumulated_batch_size


# --- Lightning's loops -----------------------------------------------------------------------------------------------
# Lightning 2.6 guesses from its counters what a checkpoint still had to do, and guesses wrong at the places that the
# class's docstring lists. The functions below say it instead.


def _rewind(fit: dict[str, Any]) -> str:
    """Change the saved state of the fit loop so that Lightning neither skips nor repeats, and return where it stands.

    Args:
        fit: ``checkpoint["loops"]["fit_loop"]``. Its counters say how often an epoch or a batch was made ready,
            started, processed (before the end hooks) and completed (after them), in total and in the current epoch.
    """
    epoch, batch = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
    fit["state_dict"].pop("combined_loader", None)  # rank zero's; each rank loads its own later
    epoch_over = epoch["current"]["processed"] == epoch["current"]["started"]
    if epoch_over and (batch["is_last_batch"] or batch["current"]["ready"] == 0):
        return _AT_EPOCH_END if epoch["current"]["completed"] < epoch["current"]["processed"] else _BETWEEN_EPOCHS
    if epoch_over:  # `max_steps` or `should_stop` ended it early: open it again
        for counts in epoch["total"], epoch["current"]:
            counts["processed"] = counts["completed"] = counts["started"] - 1
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        return _AFTER_VALIDATION
    after_step = batch["current"]["completed"] < batch["current"]["processed"]
    for counts in batch["total"], batch["current"]:
        counts["completed"] = counts["processed"]
    return _AFTER_STEP if after_step else _AFTER_VALIDATION


def _resume_loops(trainer: Trainer, where: str, loader_states: list[Any]) -> None:
    """Put the loops and loaders where the checkpoint was written, after Lightning has set itself up to resume."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epochs: Any = fit.epoch_progress
    fetcher = fit._data_fetcher
    assert fetcher is not None
    loaders = _train_loaders(trainer)
    stateful = [loader for loader in loaders if hasattr(loader, "load_state_dict")]
    if where == _AT_EPOCH_END:  # the end hooks have run; what monitors a metric comes after them
        epochs.current.completed = epochs.current.processed - 1
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    if where in (_AT_EPOCH_END, _BETWEEN_EPOCHS):
        for counts in epochs.total, epochs.current:
            counts.ready = counts.started = counts.completed = counts.processed
        loop.restarting = False
        fit.on_iteration_done()  # nothing is left to resume: start the next epoch as ever
        for loader, state in zip(stateful, loader_states, strict=True):
            _load_between_epochs(loader, state)
        return
    if not loop._should_check_val_fx(fetcher):
        if not loop._should_accumulate():
            loop._batches_that_stepped += 1  # Lightning counts after the validation
        loop.val_loop._has_run = loop.batch_progress.is_last_batch  # go straight to the end of the epoch
    elif where == _AFTER_STEP:
        loop.val_loop.restarting = False
        loop.val_loop._restart_stage = "restarted_mid_evaluation"  # validate before the next step
    if not loop.batch_progress.is_last_batch:
        for loader in loaders:
            if hasattr(getattr(loader, "sampler", None), "set_epoch"):
                loader.sampler.set_epoch(epochs.current.processed)
        for loader, state in zip(stateful, loader_states, strict=True):
            loader.load_state_dict(state)
        iter(fetcher)


def _load_between_epochs(loader: Any, state: dict[str, Any]) -> None:
    """Load a state of an epoch's end: what goes on across epochs is kept, the next pass starts at its beginning."""
    if not isinstance(loader, StatefulDataLoader):
        loader.load_state_dict(state)
        return
    # Lightning counts the batches and never asks for one too many, so that the state does not say that it is the end.
    loader.load_state_dict({**state, "_iterator_finished": True})
    iter(loader)
    if isinstance(loader.sampler, StatefulDistributedSampler):
        loader.sampler.next_yielded = None  # it would start the next pass at the end of the last one


_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}


def check_optimizers(trainer: Trainer, kinds: list[str] | None, states: list[dict[str, Any]] | None) -> None:
    """Refuse the states of other optimizers than the run's; Lightning and torch load what they can of them."""
    now = [type(optimizer).__qualname__ for optimizer in trainer.optimizers]
    if kinds and kinds != now:
        raise ValueError(f"{trainer.ckpt_path} was written with the optimizers {kinds}, the run has {now}")
    if states is None or not (states or kinds):  # weights only, which Lightning refuses; saved outside of fit
        return
    if len(states) != len(now):
        raise ValueError(f"{trainer.ckpt_path} holds the states of {len(states)} optimizers, the run has {now}")
    for optimizer, state in zip(trainer.optimizers, states, strict=True):
        known = _OF_SCHEDULERS.union(*optimizer.param_groups)
        foreign = sorted(set().union(*state.get("param_groups", ())) - known)
        if foreign:
            raise ValueError(
                f"{trainer.ckpt_path} holds the state of another optimizer than {type(optimizer).__name__}: {foreign}"
            )


def _keep_best_models(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Find the best models of the run that wrote the checkpoint: beside it, or where they were."""
    for callback in trainer.checkpoint_callbacks:
        state = checkpoint["callbacks"].get(callback.state_key)
        if not isinstance(callback, ModelCheckpoint) or not state:
            continue
        beside = os.path.dirname(os.path.abspath(str(trainer.ckpt_path)))
        paths = {state["best_model_path"], state["kth_best_model_path"], *state["best_k_models"]}
        found = {}
        for path in filter(None, paths):
            places = (os.path.join(beside, os.path.basename(path)), path)
            found[path] = next(filter(os.path.exists, places), "")
        missing = sorted(path for path in found if not found[path])
        if missing and callback.monitor is not None:
            rank_zero_warn(f"These best checkpoints so far are gone, and forgotten: {missing}")
        state["best_k_models"] = {found[path]: score for path, score in state["best_k_models"].items() if found[path]}
        for key in ("best_model_path", "kth_best_model_path"):
            state[key] = found.get(state[key], "")
        state["dirpath"] = callback.dirpath  # which is what it compares


def _train_loaders(trainer: Trainer) -> list[Any]:
    loaders = trainer.train_dataloader
    return [] if loaders is None else CombinedLoader(loaders).flattened


def _check_loaders(trainer: Trainer) -> None:
    for loader in _train_loaders(trainer):
        kind = type(loader).__name__
        sampler = getattr(loader, "sampler", None)
        if not hasattr(loader, "state_dict"):
            problem = f"the training loader is a {kind}, which does not know its place in the data"
        elif "RandomSampler" in type(sampler).__name__:
            problem = "the training loader has shuffle=True, whose order is new in every process"
        elif type(sampler).__module__.startswith("lightning."):
            problem = "Lightning replaced the training loader's sampler"
        elif isinstance(loader, DataLoader) and not _has_length(loader):
            problem = "the training dataset has no __len__, so that Lightning fetches a batch ahead, lost on a resume"
        else:
            continue
        rank_zero_warn(
            f"ExactResume: {problem}. A run resumed within an epoch will differ. Cure: a torchdata StatefulDataLoader "
            "with its own sampler (lit_methods.datamodules.tensors.ShuffledSampler) or a dataset with a state_dict and "
            "a length, and Trainer(use_distributed_sampler=False)."
        )


def _check_lengths(trainer: Trainer) -> None:
    """Refuse ranks of unequal length: the longer ones would wait for the others' gradients for ever."""
    lengths = gather_objects(trainer.num_training_batches)
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the training loaders must have equally many batches on every rank, got {lengths}: use torchdata's "
            f"StatefulDistributedSampler, or Trainer(limit_train_batches={min(lengths)})"
        )


def _has_length(loader: DataLoader[Any]) -> bool:
    try:
        len(loader)
    except TypeError:
        return False
    return True
