"""Resuming from every checkpoint of a run, in one process; ``tests/distributed/test_kill_resume.py`` really kills."""

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from lit_methods.batches import SupervisedBatch
from lit_methods.callbacks import ExactResume, LastCheckpoint
from lit_methods.datamodules import TensorDataModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*exists and is not empty",
    "ignore:.*Consider setting `persistent_workers",
    "ignore:The number of training batches",
)

ROWS = 23
BATCH_SIZE = 4
BATCHES = 6


class Log(Logger):
    """Keeps what is logged as (step, name, value)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str, float]] = []

    @property
    def name(self) -> str:
        return "log"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines += [(step, name, float(value)) for name, value in metrics.items()]


class Probe(pl.LightningModule):
    """Writes down everything that happens, with dropout, random augmentation and draws from all three generators."""

    def __init__(self, scheduler: str = "step") -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.metrics = MetricCollection({"mean": MeanMetric(), "sum": SumMetric(), "again": SumMetric()})
        self.scheduler = scheduler
        self.events: list[tuple[Any, ...]] = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch._replace(x=batch.x + torch.rand_like(batch.x)) if self.trainer.training else batch

    def training_step(self, batch, batch_idx):
        loss = self.network(batch.x / ROWS).pow(2).mean()
        rows = tuple(batch.y.tolist())
        draws = (random.random(), float(np.random.rand()), torch.rand(()).item())  # noqa: NPY002
        lr = self.optimizers().param_groups[0]["lr"]
        self.events.append(("step", self.current_epoch, batch_idx, self.global_step, rows, draws, lr, loss.item()))
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.metrics.update(loss.detach())
        self.log_dict(self.metrics, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.network(batch.x / ROWS).pow(2).mean())

    def on_train_epoch_start(self):
        self.events.append(("epoch starts", self.current_epoch))

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.events.append(("validated", self.current_epoch, self.global_step))

    def on_train_epoch_end(self):
        self.events.append(("epoch ends", self.current_epoch, torch.rand(()).item()))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        if self.scheduler == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        if self.scheduler == "one cycle":
            steps = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Bookmark(ModelCheckpoint):
    """Keeps every checkpoint it writes, with the number of events before it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, save_top_k=-1, filename="{step}-{epoch}", **options)
        self.written: dict[str, int] = {}

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.written[filepath] = len(trainer.lightning_module.events)


def make_data(num_workers: int = 0) -> TensorDataModule:
    x = torch.arange(ROWS)
    rows = SupervisedBatch(x[:, None].float(), x)
    val = SupervisedBatch(rows.x[:5], rows.y[:5])
    return TensorDataModule(rows, val=val, batch_size=BATCH_SIZE, num_workers=num_workers, seed=3)


class UsersData(TensorDataModule):
    """A user's loaders: torchdata's sampler instead of ours, and no thought of epochs."""

    def train_dataloader(self):
        rows = super().train_dataloader().dataset
        sampler = StatefulDistributedSampler(rows, 1, 0, seed=3)
        workers = self.num_workers
        return StatefulDataLoader(
            rows, BATCH_SIZE, sampler=sampler, num_workers=workers, collate_fn=lambda batch: batch
        )


def users_data(num_workers: int = 0) -> TensorDataModule:
    data = make_data()
    return UsersData(data.train_data, val=data.val_data, num_workers=num_workers)


def run(
    folder: Path,
    data: pl.LightningDataModule,
    checkpoint: ModelCheckpoint | None = None,
    resume: str | Path | None = None,
    scheduler: str = "step",
    probe: type[Probe] = Probe,
    **options: Any,
) -> tuple[Probe, Log, pl.Trainer]:
    pl.seed_everything(0 if resume is None else 99, verbose=False)
    module, log = probe(scheduler), Log()
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=log,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=checkpoint is not None,
        callbacks=[ExactResume(), *([checkpoint] if checkpoint else [])],
        use_distributed_sampler=False,
        **({"max_epochs": 3} | options),
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, log, trainer


def assert_same_end(resumed: Probe, whole: Probe) -> None:
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    for mine, theirs in zip(
        resumed.trainer.optimizers[0].state.values(), whole.trainer.optimizers[0].state.values(), strict=True
    ):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


class Walk(IterableDataset):
    """A stream that goes on across epochs, as environments and replay buffers do."""

    def __init__(self) -> None:
        self.place = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self):
        for _ in range(BATCHES):
            self.place += 1
            yield SupervisedBatch(torch.full((2, 1), float(self.place)), torch.full((2,), self.place))

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class OwnLoader(Walk):
    """A loader of somebody's own."""


class WalkData(pl.LightningDataModule):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own

    def train_dataloader(self):
        return OwnLoader() if self.own else StatefulDataLoader(Walk(), batch_size=None)

    def val_dataloader(self):
        return make_data().val_dataloader()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("limit", [BATCHES, BATCHES - 1])
def test_streams_go_on_after_a_checkpoint_of_an_epochs_end(tmp_path, own, limit):
    checkpoint = Bookmark(tmp_path / "whole", save_on_train_epoch_end=True)
    whole, log, _ = run(tmp_path, WalkData(own), checkpoint, limit_train_batches=limit)
    rows = [event[4] for event in whole.events if event[0] == "step"]
    assert len(set(rows)) == 3 * limit
    for path, events_before in list(checkpoint.written.items())[:-1]:
        resumed, resumed_log, _ = run(tmp_path, WalkData(own), resume=path, limit_train_batches=limit)
        assert resumed.events == whole.events[events_before:]
        assert_same_log(resumed_log, log, torch.load(path, weights_only=True))


AT_EVERY_STEP = {"every_n_train_steps": 1}
AT_EPOCH_ENDS = {"save_on_train_epoch_end": True}
AFTER_VALIDATIONS = {"save_on_train_epoch_end": False}


@pytest.mark.parametrize(
    ("make", "when", "scheduler", "options"),
    [
        (make_data, AT_EVERY_STEP, "step", {}),
        (users_data, AT_EVERY_STEP, "step", {"limit_val_batches": 0, "limit_train_batches": 5}),
        (make_data, AT_EVERY_STEP, "plateau", {"val_check_interval": 0.5}),
        (make_data, AT_EVERY_STEP, "step", {"max_steps": 16, "max_epochs": -1, "val_check_interval": 2}),
        (make_data, AT_EVERY_STEP, "one cycle", {"accumulate_grad_batches": 2}),
        (make_data, AT_EPOCH_ENDS, "plateau", {}),
        (users_data, AT_EPOCH_ENDS, "plateau", {}),
        (make_data, AT_EPOCH_ENDS, "one cycle", {"max_steps": 16}),
        (make_data, AT_EPOCH_ENDS, "step", {"max_steps": 16, "max_epochs": -1, "limit_val_batches": 0}),
        (make_data, AFTER_VALIDATIONS, "plateau", {"val_check_interval": 0.5}),
        (users_data, AFTER_VALIDATIONS, "step", {"max_steps": 16, "max_epochs": -1}),
    ],
)
def test_resuming_from_every_checkpoint(tmp_path, make, when, scheduler, options):
    checkpoint = Bookmark(tmp_path / "whole", **when)
    whole, log, _ = run(tmp_path, make(), checkpoint, scheduler=scheduler, **options)
    assert len(checkpoint.written) > 1
    for path, events_before in checkpoint.written.items():
        saved = torch.load(path, weights_only=True)
        if saved["global_step"] == options.get("max_steps"):
            continue  # nothing is left to do
        again = Bookmark(tmp_path / "again" / Path(path).stem, **when)
        resumed, resumed_log, _ = run(tmp_path, make(), again, resume=path, scheduler=scheduler, **options)
        assert resumed.events == whole.events[events_before:], path
        assert_same_end(resumed, whole)
        assert_same_log(resumed_log, log, saved)


def assert_same_log(resumed: Log, whole: Log, saved: dict[str, Any]) -> None:
    """All that is logged after the checkpoint's own step is the same, but for what the docstring excepts."""
    step = saved["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    later = [line for line in whole.lines if line[0] > step]
    assert [line for line in resumed.lines if line[0] > step] == later


@pytest.mark.parametrize("make", [make_data, users_data])
def test_worker_processes(tmp_path, make):
    whole, _, _ = run(tmp_path, make(2), checkpoint := Bookmark(tmp_path / "whole", every_n_train_steps=4))
    for path, events_before in checkpoint.written.items():  # steps 4, 8, 12, 16: the third is an epoch's last
        resumed, _, _ = run(tmp_path, make(2), resume=path)
        assert resumed.events == whole.events[events_before:], path
        assert_same_end(resumed, whole)
    epochs = Bookmark(tmp_path / "epochs", save_on_train_epoch_end=True)
    run(tmp_path, make(2), epochs)
    for path, events_before in epochs.written.items():
        resumed, _, _ = run(tmp_path, make(2), resume=path)
        assert resumed.events == whole.events[events_before:], path


class DrawsInStepsOnly(Probe):
    """The end of an epoch, which comes early here, must not draw for this comparison."""

    def on_train_epoch_end(self):
        pass


@pytest.mark.parametrize(("steps", "when"), [(4, {}), (12, {}), (16, AT_EPOCH_ENDS), (6, AT_EPOCH_ENDS)])
def test_longer_than_first_thought(tmp_path, steps, when):
    """``max_steps`` ended a run, also within an epoch; ``max_steps`` is raised and the run goes on."""
    whole, log, _ = run(tmp_path, make_data(), probe=DrawsInStepsOnly, max_steps=18)
    checkpoint = Bookmark(tmp_path / "short", **when) if when else None
    short, _, trainer = run(tmp_path, make_data(), checkpoint, probe=DrawsInStepsOnly, max_steps=steps)
    if checkpoint is not None:
        path = list(checkpoint.written)[-1]
    else:
        torch.rand(3)  # what happens after training is not part of it
        path = str(tmp_path / "after_fit.ckpt")
        trainer.save_checkpoint(path)
    resumed, resumed_log, _ = run(tmp_path, make_data(), resume=path, probe=DrawsInStepsOnly, max_steps=18)
    assert [*short.events, *resumed.events] == whole.events
    losses = [line for line in log.lines if line[1] == "loss_step"]
    assert [line for line in resumed_log.lines if line[1] == "loss_step"] == losses[steps:]
    assert_same_end(resumed, whole)


def test_epoch_means_and_metrics_cover_the_whole_epoch(tmp_path):
    whole, log, _ = run(tmp_path, make_data(), checkpoint := Bookmark(tmp_path / "whole", every_n_train_steps=3))
    means = ("loss_epoch", "largest", "mean", "sum", "again")
    expected = [line for line in log.lines if line[1] in means]
    assert len(expected) == 3 * len(means)
    losses = [event[-1] for event in whole.events if event[0] == "step"]
    assert expected[1][2] == max(losses[:BATCHES])
    middle_of_second_epoch = list(checkpoint.written)[2]
    _, resumed_log, _ = run(tmp_path, make_data(), resume=middle_of_second_epoch)
    assert [line for line in resumed_log.lines if line[1] in means] == expected[len(means) :]


def test_state_is_plain_data(tmp_path):
    _, _, trainer = run(tmp_path, make_data(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]["ExactResume"]
    callback = ExactResume()
    assert callback.state_dict() == {}
    callback.load_state_dict(state)
    assert callback.state_dict() is not state
    assert callback.state_dict()["ranks"] == state["ranks"]
    assert len(state["ranks"]) == 1
    assert state["ranks"][0]["rng"]["torch"].dtype == torch.uint8


def test_generators_round_trip():
    from lit_methods.callbacks.exact_resume import capture_rng, restore_rng

    def draw():
        rng = np.random
        return random.gauss(0, 1), random.random(), rng.randn(), rng.rand(), torch.randn(3).tolist()

    draw()  # leaves half a pair of normal numbers in Python's and NumPy's generators
    state = capture_rng(torch.device("cpu"))
    expected = [draw(), draw()]
    restore_rng(state, torch.device("cpu"))
    assert [draw(), draw()] == expected


class Plain(pl.LightningModule):
    """Trains on any loader of ``(x,)`` batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch):
        return self.weight * torch.as_tensor(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.ones(4, 1))


class SizedStream(Stream):
    def __len__(self):
        return 4


def warnings_of(loader, tmp_path, recwarn, **options: Any) -> list[str]:
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=1,
        callbacks=[ExactResume()],
        **options,
    )
    trainer.fit(Plain(), loader)
    return [str(w.message) for w in recwarn if "ExactResume" in str(w.message)]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            lambda: DataLoader(torch.ones(4, 1), shuffle=True),
            "the training loader is a DataLoader, which does not know",
        ),
        (lambda: StatefulDataLoader(torch.ones(4, 1), shuffle=True), "the training loader has shuffle=True"),
        (lambda: StatefulDataLoader(Stream()), "the training dataset has no __len__"),
    ],
)
def test_warns_of_loaders_that_cannot_resume(tmp_path, recwarn, loader, message):
    (warning,) = warnings_of(loader(), tmp_path, recwarn)
    assert message in warning
    assert "Cure: a torchdata StatefulDataLoader with its own sampler" in warning


@pytest.mark.parametrize(
    "loader", [lambda: StatefulDataLoader(torch.ones(4, 1)), lambda: StatefulDataLoader(SizedStream())]
)
def test_does_not_warn_of_good_loaders(tmp_path, recwarn, loader):
    assert warnings_of(loader(), tmp_path, recwarn) == []


def test_checkpoint_without_the_callback(tmp_path):
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1
    )
    trainer.fit(Plain(), StatefulDataLoader(torch.ones(4, 1)))
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    with pytest.warns(UserWarning, match="written without ExactResume"):
        pl.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            max_epochs=2,
            callbacks=[ExactResume()],
        ).fit(Plain(), StatefulDataLoader(torch.ones(4, 1)), ckpt_path=tmp_path / "without.ckpt")


def test_another_number_of_ranks(tmp_path):
    _, _, trainer = run(tmp_path, make_data(), max_steps=4)
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["ExactResume"]["ranks"] *= 2
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="written on 2 ranks and is resumed on 1"):
        resumed, _, _ = run(tmp_path, make_data(), resume=path, max_steps=8)
    assert [event[3] for event in resumed.events if event[0] == "step"] == [4, 5, 6, 7]


def test_testing_restores_nothing(tmp_path):
    _, _, trainer = run(tmp_path, make_data(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    trainer.validate(trainer.lightning_module, datamodule=make_data(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert torch.rand(()) == expected


class Scripted(Probe):
    """Its validation loss is given per epoch."""

    losses = (0.5, 0.1, 0.4, 0.3)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.losses[self.current_epoch])


@pytest.mark.parametrize("files_exist", [True, False])
def test_best_model_is_remembered_in_a_new_folder(tmp_path, files_exist):
    def fit(folder: str, epochs: int, ckpt_path: Path | None = None) -> ModelCheckpoint:
        checkpoint = ModelCheckpoint(tmp_path / folder, "{epoch}", monitor="val_loss", save_last=True)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = pl.Trainer(
            **quiet, max_epochs=epochs, callbacks=[ExactResume(), checkpoint], use_distributed_sampler=False
        )
        rows = SupervisedBatch(torch.arange(8.0)[:, None], torch.arange(8))
        trainer.fit(Scripted(), TensorDataModule(train=rows, val=rows, batch_size=4), ckpt_path=ckpt_path)
        return checkpoint

    fit("old", 3)
    if not files_exist:
        (tmp_path / "old" / "epoch=1.ckpt").unlink()
    resumed = fit("new", 4, tmp_path / "old" / "last.ckpt")
    best = tmp_path / ("old/epoch=1.ckpt" if files_exist else "new/epoch=3.ckpt")
    assert resumed.best_model_path == str(best)


def test_best_model_is_found_from_another_working_folder(tmp_path, monkeypatch):
    """As with loggers whose ``save_dir`` is relative."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    rows = SupervisedBatch(torch.arange(8.0)[:, None], torch.arange(8))

    def fit(epochs: int, ckpt_path: str | None = None) -> ModelCheckpoint:
        best = ModelCheckpoint(filename="best", monitor="val_loss", mode="min")
        best.dirpath = "checkpoints"  # relative, as a logger gives it
        trainer = pl.Trainer(
            **quiet, max_epochs=epochs, callbacks=[ExactResume(), best, LastCheckpoint()], use_distributed_sampler=False
        )
        trainer.fit(Scripted(), TensorDataModule(train=rows, val=rows, batch_size=4), ckpt_path=ckpt_path)
        return best

    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    assert fit(3).best_model_score == pytest.approx(0.1)
    monkeypatch.chdir(tmp_path / "second")
    resumed = fit(4, "../first/checkpoints/last.ckpt")
    assert resumed.best_model_score == pytest.approx(0.1)
    assert Path(resumed.best_model_path).samefile(tmp_path / "first/checkpoints/best.ckpt")
