import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torchmetrics import MeanAbsoluteError

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules import DigitsDataModule
from lit_methods.datamodules.tensors import TensorDataModule
from lit_methods.nets import MLP
from lit_methods.supervised import SSOModule, SupervisedModule


def quiet_trainer(**arguments) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**quiet | {"enable_checkpointing": False, "use_distributed_sampler": False} | arguments)


def regression_data() -> TensorDataModule:
    x = torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
    batch = SupervisedBatch(x, x @ torch.tensor([[1.0], [-2.0], [0.5]]))
    return TensorDataModule(train=batch, val=batch, test=batch, batch_size=32)


def test_regression_learns_and_uses_given_loss_and_metrics() -> None:
    module = SupervisedModule(
        MLP(3, [], 1),
        loss=nn.L1Loss(),
        metrics={"mae": MeanAbsoluteError()},
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
    )
    trainer, data = quiet_trainer(max_epochs=30), regression_data()
    trainer.fit(module, data)
    (results,) = trainer.test(module, data, verbose=False)
    assert set(results) == {"test/loss", "test/mae"}
    assert results["test/loss"] == pytest.approx(results["test/mae"], abs=1e-6)
    assert results["test/mae"] < 0.2
    (*_, last) = trainer.predict(module, data)
    torch.testing.assert_close(last, module(data.test_data.x[-32:]))


def test_metrics_equal_their_definition() -> None:
    torch.manual_seed(0)
    module, data = SupervisedModule(MLP(64, [8], 10), num_classes=10), DigitsDataModule(batch_size=50)
    (results,) = quiet_trainer().test(module, data, verbose=False)
    x, y = data.test_data
    logits = module(x)
    assert results["test/accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item(), abs=1e-6)
    assert results["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    module = SupervisedModule(MLP(3, [4], 1))
    module.network[1].requires_grad_(False)
    assert len(module.configure_optimizers().param_groups[0]["params"]) == 2


def test_plateau_scheduler_gets_its_monitor() -> None:
    module = SupervisedModule(MLP(3, [4], 1), lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val/loss"))
    assert module.configure_optimizers()["lr_scheduler"]["monitor"] == "val/loss"


def test_direct_build_loads_from_checkpoint_when_given_its_network_again(tmp_path) -> None:
    module, trainer = SupervisedModule(MLP(3, [4], 1)), quiet_trainer(max_steps=1)
    trainer.fit(module, regression_data())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    loaded = SupervisedModule.load_from_checkpoint(tmp_path / "m.ckpt", network=MLP(3, [4], 1), weights_only=True)
    x = torch.randn(5, 3)
    torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0)


def test_sso_module_steps_schedules_and_keeps_running_statistics() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(MLP(64, [16], 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    module = SSOModule(network, num_classes=10, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5))
    trainer, data = quiet_trainer(max_epochs=2), DigitsDataModule(batch_size=128)
    trainer.fit(module, data)
    assert int(network[1].num_batches_tracked) == trainer.global_step
    assert trainer.optimizers[0].param_groups[0]["lr"] == 2.0 / 4
    (results,) = trainer.test(module, data, verbose=False)
    assert results["test/accuracy"] > 0.8


def test_sso_module_refuses_other_optimizers_and_schedules_with_metrics() -> None:
    adam = SSOModule(MLP(3, [], 1), optimizer=lambda params: torch.optim.Adam(params))
    with pytest.raises(TypeError, match="needs an optimizer that is an SSO, got Adam"):
        adam.configure_optimizers()
    plateau = SSOModule(MLP(3, [], 1), lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val/loss"))
    with pytest.raises(TypeError, match="without a metric"):
        plateau.configure_optimizers()
