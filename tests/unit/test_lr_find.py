import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lit_methods.black_box import CBOModule
from lit_methods.datamodules import DigitsDataModule
from lit_methods.nets import MLP
from lit_methods.optim import MFAC
from lit_methods.supervised import SSOModule, SupervisedModule

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}


def trainer(folder, **options) -> Trainer:
    return Trainer(**QUIET, max_steps=5, default_root_dir=folder, use_distributed_sampler=False, **options)


@pytest.mark.parametrize("make", [SSOModule, CBOModule])
def test_refused_where_it_never_changes_the_learning_rate(tmp_path, make) -> None:
    module: LightningModule = make(MLP(64, [], 10), num_classes=10)
    with pytest.raises(ValueError, match=f"lr_find cannot choose a learning rate for {make.__name__}"):
        Tuner(trainer(tmp_path)).lr_find(module, DigitsDataModule(), update_attr=False, num_training=3)
    with pytest.raises(ValueError, match="lr_find cannot choose"):
        trainer(tmp_path, callbacks=[LearningRateFinder(num_training_steps=3, update_attr=False)]).fit(
            make(MLP(64, [], 10), num_classes=10), DigitsDataModule()
        )


def test_works_where_lightning_steps_the_optimizer(tmp_path) -> None:
    module = SupervisedModule(MLP(64, [], 10), num_classes=10, optimizer=lambda params: MFAC(params, lr=0.1))
    found = Tuner(trainer(tmp_path)).lr_find(
        module, DigitsDataModule(), update_attr=False, num_training=10, early_stop_threshold=None
    )
    assert found is not None
    assert len(set(found.results["lr"])) == 10
