import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import RandomSampler

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules import TensorDataModule
from lit_methods.datamodules.tensors import TensorRows


def rows(n: int, start: int = 0) -> SupervisedBatch:
    x = torch.arange(start, start + n)
    return SupervisedBatch(x[:, None].float(), x)


class Ranked(TensorDataModule):
    """A datamodule that believes to be on one of several ranks."""

    ranks = (1, 0)

    def _ranks(self) -> tuple[int, int]:
        return self.ranks


def epoch(loader, number: int = 0) -> list[list[int]]:
    loader.sampler.set_epoch(number)
    return [batch.y.tolist() for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_have_the_type_of_the_data(num_workers):
    data = TensorDataModule(rows(10), batch_size=4, num_workers=num_workers)
    batches = list(data.train_dataloader())
    assert [type(batch) for batch in batches] == [SupervisedBatch] * 3
    assert [len(batch.x) for batch in batches] == [4, 4, 2]
    assert all(torch.equal(batch.x[:, 0], batch.y.float()) for batch in batches)
    assert sorted(torch.cat([batch.y for batch in batches]).tolist()) == list(range(10))


def test_single_rows_and_transform():
    data = TensorRows(rows(5), lambda batch: SupervisedBatch(batch.x * 10, batch.y))
    assert len(data) == 5
    assert torch.equal(data[3].x, torch.tensor([30.0]))
    assert data[3].y == 3
    assert torch.equal(data.__getitems__([4, 1]).x, torch.tensor([[40.0], [10.0]]))


def test_order_depends_on_seed_and_epoch_only():
    first = TensorDataModule(rows(50), seed=1).train_dataloader()
    torch.manual_seed(123)
    again = TensorDataModule(rows(50), seed=1).train_dataloader()
    assert epoch(first, 0) == epoch(again, 0)
    assert epoch(first, 7) == epoch(again, 7)
    assert epoch(first, 0) != epoch(first, 1)
    assert epoch(first, 0) != epoch(TensorDataModule(rows(50), seed=2).train_dataloader(), 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_generator_alone(num_workers):
    data = TensorDataModule(rows(10), val=rows(10), batch_size=4, num_workers=num_workers)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_out_training_and_evaluation():
    data = Ranked(rows(11), test=rows(11), batch_size=3)
    shards, test_shards = [], []
    for rank in range(2):
        data.ranks = (2, rank)
        shards.append([label for batch in epoch(data.train_dataloader()) for label in batch])
        test_shards.append([int(label) for batch in data.test_dataloader() for label in batch.y])
    assert [len(shard) for shard in shards] == [6, 6]  # equally many steps: one sample is repeated
    assert set(shards[0]) | set(shards[1]) == set(range(11))
    assert test_shards == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]  # every sample once
    data.ranks = (2, 1)
    assert len(data.test_dataloader()) == 2


class Collect(pl.LightningModule):
    """Records what each loop of a Trainer gets to see."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[int]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch):
        self.seen["train"] += batch.y.tolist()
        return self.weight * batch.x.sum()

    def validation_step(self, batch):
        self.seen["val"] += batch.y.tolist()

    def test_step(self, batch):
        self.seen["test"] += batch.y.tolist()

    def predict_step(self, batch):
        return batch.y

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path, **options):
    return pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **options,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_all_trainer_loops(tmp_path):
    data = TensorDataModule(rows(9), val=rows(5, 100), test=rows(7, 200), batch_size=4)
    module = Collect()
    run = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    run.fit(module, datamodule=data)
    first, second = module.seen["train"][:9], module.seen["train"][9:]
    assert sorted(first) == sorted(second) == list(range(9))
    assert first != second
    assert module.seen["val"] == list(range(100, 105)) * 2
    run.test(module, datamodule=data, verbose=False)
    assert module.seen["test"] == list(range(200, 207))
    predictions = run.predict(module, datamodule=data)
    assert torch.cat(predictions).tolist() == list(range(200, 207))


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
def test_missing_splits_mean_no_loop(tmp_path):
    module = Collect()
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=TensorDataModule(rows(4)))
    assert len(module.seen["train"]) == 4
    assert module.seen["val"] == []


def test_no_training_data():
    with pytest.raises(RuntimeError, match="holds no training data"):
        TensorDataModule().train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"Invalid batch_size=0: must be an integer >= 1"),
        ({"batch_size": 2.0}, r"Invalid batch_size=2.0"),
        ({"num_workers": -1}, r"Invalid num_workers=-1: must be an integer >= 0"),
        ({"seed": -3}, r"Invalid seed=-3"),
        ({"train": (torch.zeros(2), torch.zeros(2))}, r"Invalid train: must be a NamedTuple"),
        ({"train": SupervisedBatch(torch.zeros(3, 1), torch.zeros(2))}, r"Invalid train: .*\[3, 2\]"),
        ({"train": SupervisedBatch(torch.zeros(0, 1), torch.zeros(0))}, r"Invalid train: .*\[0, 0\]"),
        ({"val": SupervisedBatch(torch.zeros(3, 1), torch.zeros(2))}, r"Invalid val"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TensorDataModule(**arguments)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
def test_resuming_with_other_data_settings_is_refused(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Collect(), datamodule=TensorDataModule(rows(8), test=rows(3), batch_size=2))
    run.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"batch_size=2 \(now 4\), seed=0 \(now 1\): its place"):
        trainer(tmp_path, max_epochs=2).fit(
            Collect(), datamodule=TensorDataModule(rows(8), batch_size=4, seed=1), ckpt_path=tmp_path / "run.ckpt"
        )
    module = Collect()  # testing may use any batch size
    trainer(tmp_path).test(
        module,
        datamodule=TensorDataModule(rows(8), test=rows(3), batch_size=4),
        ckpt_path=tmp_path / "run.ckpt",
        verbose=False,
    )
    assert module.seen["test"] == [0, 1, 2]


def test_samplers_survive_lightnings_own_sharding():
    """``use_distributed_sampler`` left on must not shard the shard."""
    data = Ranked(rows(8), test=rows(8))
    data.ranks = (2, 0)
    for loader in (data.train_dataloader(), data.test_dataloader()):
        assert isinstance(loader.sampler, torch.utils.data.DistributedSampler)
        assert not isinstance(loader.sampler, RandomSampler)
