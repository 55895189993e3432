import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn

from lit_methods.black_box import CBOModule
from lit_methods.datamodules import DigitsDataModule
from lit_methods.nets import PostNormMLP
from lit_methods.optim import CBO, AdamCBO, ConsensusBasedSampling, ConsensusHopping, MemoryCBO, PolarizedCBO
from lit_methods.optim.cbo import ParticleBatches

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def fit(module: CBOModule, epochs: int, **trainer) -> Trainer:
    runner = Trainer(max_epochs=epochs, enable_checkpointing=False, use_distributed_sampler=False, **QUIET, **trainer)
    runner.fit(module, DigitsDataModule(batch_size=64))
    return runner


def test_learns_digits_from_losses() -> None:
    torch.manual_seed(0)
    module = CBOModule(
        PostNormMLP(64, [10]),
        num_classes=10,
        optimizer=lambda params: CBO(params, alpha=5.0, num_particles=60, batches=ParticleBatches(20)),
    )
    trainer = fit(module, 8)
    assert trainer.callback_metrics["val/accuracy"] > 0.3  # chance is 0.1
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_learns_in_half_precision(precision) -> None:
    torch.manual_seed(0)
    module = CBOModule(
        PostNormMLP(64, [10]),
        num_classes=10,
        optimizer=lambda params: CBO(params, alpha=5.0, num_particles=60, batches=ParticleBatches(20)),
    )
    trainer = fit(module, 4, precision=precision)
    assert trainer.callback_metrics["val/accuracy"] > 0.2  # chance is 0.1
    assert next(module.network.parameters()).dtype.itemsize == 2
    (optimizer,) = trainer.optimizers
    assert next(iter(optimizer.particles.values())).dtype == torch.float32


@pytest.mark.parametrize("kind", [AdamCBO, ConsensusBasedSampling, ConsensusHopping, MemoryCBO, PolarizedCBO])
def test_takes_the_kin_of_cbo_and_several_runs(kind) -> None:
    torch.manual_seed(0)
    module = CBOModule(
        PostNormMLP(64, [10]), num_classes=10, optimizer=lambda params: kind(params, num_particles=6, num_runs=2)
    )
    trainer = fit(module, 1, limit_train_batches=2, limit_val_batches=1)
    (optimizer,) = trainer.optimizers
    weight = next(iter(optimizer.consensus_of_runs().values()))
    assert weight.shape == (2, 10, 64)
    assert any(torch.equal(next(module.network.parameters()), run) for run in weight)


def test_a_loss_without_gradient_and_running_statistics() -> None:
    class ZeroOne(nn.Module):
        def forward(self, outputs, y):
            return (outputs.argmax(1) != y).float().mean()

    torch.manual_seed(0)
    module = CBOModule(
        PostNormMLP(64, [10]),
        num_classes=10,
        loss=ZeroOne(),
        optimizer=lambda params: CBO(params, num_particles=10, batches=ParticleBatches(None)),
        chunk_size=4,
    )
    fit(module, 1, limit_train_batches=3)
    norm = module.network[-1]
    assert norm.num_batches_tracked == 3
    assert norm.running_mean.abs().sum() > 0


def test_other_optimizers_are_refused() -> None:
    module = CBOModule(nn.Linear(2, 2), num_classes=2, optimizer=torch.optim.Adam)
    with pytest.raises(TypeError, match=r"CBO or ConsensusHopping, got Adam.*SupervisedModule"):
        module.configure_optimizers()


def test_refuses_a_schedule_that_needs_a_metric() -> None:
    module = CBOModule(PostNormMLP(64, [10]), 10, lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val/loss"))
    with pytest.raises(TypeError, match="without a metric"):
        module.configure_optimizers()
