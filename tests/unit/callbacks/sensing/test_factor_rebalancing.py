from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_methods.callbacks import FactorRebalancing
from lit_methods.datamodules import SensingDataModule
from lit_methods.sensing import AsymmetricSensing
from tests.distributed.launch import run_ranks


def fit(callback, module, steps, folder, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        max_steps=steps,
        callbacks=[callback],
        default_root_dir=folder,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **quiet,
        **arguments,
    )
    data = SensingDataModule(10, rank=2, measurements="entries", num_measurements=None)
    trainer.fit(module, data)
    return trainer


def test_fires_once_at_the_step_and_drops_momentum(tmp_path):
    torch.manual_seed(0)
    module = AsymmetricSensing(10, 10, 4, (0.5,), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5))
    callback = FactorRebalancing(at_step=30, beta=0.5)
    trainer = fit(callback, module, 30, tmp_path)
    assert callback.fired_at == 30
    torch.testing.assert_close(torch.linalg.svdvals(module.left[0]), torch.full((4,), 0.5))
    assert not trainer.optimizers[0].state


def test_fires_by_the_loss(tmp_path):
    torch.manual_seed(0)
    callback = FactorRebalancing()
    fit(callback, AsymmetricSensing(10, 10, 4, (0.3,)), 600, tmp_path)
    first, *_, last = callback.losses
    assert callback.fired_at is not None
    assert 20 < callback.fired_at < 600
    assert last < 0.01 * first
    copy = FactorRebalancing()
    copy.load_state_dict(callback.state_dict())
    assert (copy.fired_at, copy.betas, copy.losses) == (callback.fired_at, callback.betas, callback.losses)
    assert callback.betas == pytest.approx([0.5**0.5], rel=0.1)  # of a signal of 1


def test_fires_between_steps_when_gradients_accumulate(tmp_path):
    """A gradient that was begun in the old coordinates must not be finished in the new ones."""
    fired = []

    class Recorded(FactorRebalancing):
        def fire(self, trainer, pl_module):
            fired.append(trainer.global_step)
            super().fire(trainer, pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self.fired_at == trainer.global_step and len(fired) == 1:
                fired.append(batch_idx)

    torch.manual_seed(0)
    callback = Recorded(loss_fraction=0.3)
    fit(callback, AsymmetricSensing(10, 10, 4, (0.3,)), 200, tmp_path, accumulate_grad_batches=4)
    step, batch_idx = fired
    assert (batch_idx + 1) % 4 == 0
    assert step % 100 == 0


def descend(callback, condition, alpha, seed, lr=0.1, steps=2000):
    """Gradient descent by its formulas on a 20x20 matrix of rank 3 with k = 5; returns the last squared error."""
    entries = {"measurements": "entries", "num_measurements": None, "dtype": "float64"}
    data = SensingDataModule(20, rank=3, condition_number=condition, seed=seed, **entries)
    data.setup("fit")
    matrix = data.val_data.matrix[0]
    torch.manual_seed(seed)
    module = AsymmetricSensing(20, 20, 5, (alpha,)).double()
    left, right = module.left.data, module.right.data  # the callback writes in place
    trainer = SimpleNamespace(
        world_size=1,
        is_global_zero=True,
        optimizers=[],
        global_step=0,
        strategy=SimpleNamespace(reduce_boolean_decision=bool),
    )
    for step in range(1, steps + 1):
        residual = (left @ right.mT)[0] - matrix
        step_left, step_right = residual @ right, residual.mT @ left
        left -= lr * step_left
        right -= lr * step_right
        if callback is not None:
            trainer.global_step = step
            loss = {"loss": residual.square().sum() / 2}
            callback.on_train_batch_end(trainer, module, loss, None, step)
    return float(((left @ right.mT)[0] - matrix).square().sum())


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("condition", [1, 2, 5, 10, 20])
def test_no_default_firing_diverges(condition, rank):
    """Beyond a condition number of 10 the slowest part of the signal decides, which needs more than 2000 steps."""
    for alpha in (0.5, 0.1):
        for seed in (0, 1):
            callback = FactorRebalancing(rank=rank)
            error = descend(callback, condition, alpha, seed)
            assert callback.fired_at is not None
            assert error < (1e-3 if condition == 20 else max(descend(None, condition, alpha, seed), 1e-20))


def test_a_firing_that_raises_the_loss_is_taken_back():
    """Three quarters of the largest stable step: the first beta is too small for it."""
    callback = FactorRebalancing()
    with pytest.warns(UserWarning, match="the loss rose to .* The factors from before are back; the next beta"):
        error = descend(callback, 20, 0.1, 0, lr=0.75)
    assert error < descend(None, 20, 0.1, 0, lr=0.75)
    callback = FactorRebalancing(at_step=400, beta=0.05)
    with pytest.warns(UserWarning, match="it will not fire again"):
        error = descend(callback, 5, 0.5, 0)
    assert callback.fired_at is None
    assert error < 1e-10


class Manual(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.left, self.right = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(3, 2))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward((self.left @ self.right.T).square().sum())
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_manual_optimization_needs_a_step(tmp_path):
    callback = FactorRebalancing(at_step=3, beta=1.0)
    fit(callback, Manual(), 4, tmp_path)
    assert callback.fired_at == 3
    with pytest.raises(ValueError, match="at_step=None decides by the loss"):
        fit(FactorRebalancing(), Manual(), 4, tmp_path)


class LowRank(nn.Module):
    """The layout of LoRA in peft."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, 5, bias=False)})

    def forward(self, x):
        return self.lora_B["default"](self.lora_A["default"](x))


class Lora(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([LowRank(), LowRank()])

    def training_step(self, batch, batch_idx):
        return sum(layer(torch.ones(1, 6)).square().sum() for layer in self.layers)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_finds_lora_pairs_and_keeps_their_product(tmp_path):
    torch.manual_seed(0)
    module = Lora()
    before = [layer(torch.eye(6)) for layer in module.layers]
    fit(FactorRebalancing("(.*)lora_B(.*)", r"\1lora_A\2", True, at_step=1, beta=2.0), module, 2, tmp_path)
    for layer, outputs in zip(module.layers, before, strict=True):
        torch.testing.assert_close(layer(torch.eye(6)), outputs)
        torch.testing.assert_close(torch.linalg.svdvals(layer.lora_B["default"].weight), torch.full((3,), 2.0))


def test_names_that_match_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="matches none of the parameters"):
        fit(FactorRebalancing("lefty"), AsymmetricSensing(10, 10, 2), 1, tmp_path)
    with pytest.raises(ValueError, match="which is no parameter"):
        fit(FactorRebalancing(right="righty"), AsymmetricSensing(10, 10, 2), 1, tmp_path)


def _train(rank):
    class Gloo:  # the Trainer's part of the contract, on a process group that already runs
        world_size, global_rank, is_global_zero, global_step = 2, rank, rank == 0, 7
        optimizers = ()

    torch.manual_seed(0)
    module = AsymmetricSensing(6, 6, 3, (1.0,))
    if rank:
        module.right.data += 1e-3  # ranks that would not agree by themselves
    callback = FactorRebalancing(at_step=7)
    callback.on_train_batch_end(Gloo(), module, None, None, 0)
    return callback.fired_at, module.left.detach(), module.right.detach()


def test_ranks_get_the_factors_of_rank_zero():
    (step, left, right), (step_1, left_1, right_1) = run_ranks(_train, 2)
    assert step == step_1 == 7
    assert torch.equal(left, left_1)
    assert torch.equal(right, right_1)


def rebalance_sharded(rank: int) -> list[torch.Tensor]:
    torch.manual_seed(rank)  # rank zero's numbers must win
    module = Lora()
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    weights = [p.full_tensor().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    trainer = SimpleNamespace(world_size=2, is_global_zero=rank == 0, optimizers=[optimizer], global_step=1)
    FactorRebalancing("(.*)lora_B(.*)", r"\1lora_A\2", True, at_step=1, beta=2.0).fire(trainer, module)
    assert not optimizer.state
    return weights + [p.full_tensor() for p in module.parameters()]


def test_sharded_factors_keep_their_product():
    ranks = run_ranks(rebalance_sharded, 2)
    for first, second in zip(*ranks, strict=True):
        assert torch.equal(first, second)
    a, b, a2, b2, new_a, new_b, new_a2, new_b2 = ranks[0]
    for old, new in (((a, b), (new_a, new_b)), ((a2, b2), (new_a2, new_b2))):
        torch.testing.assert_close(new[1] @ new[0], old[1] @ old[0])
        torch.testing.assert_close(torch.linalg.svdvals(new[1]), torch.full((3,), 2.0))
