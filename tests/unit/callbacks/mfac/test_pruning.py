"""MFACPruning: the rule against closed forms, and masks that stay put whatever the run does."""

import copy
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from lit_methods.callbacks import MFACPruning
from lit_methods.datamodules import DigitsDataModule
from lit_methods.nets import MLP
from lit_methods.optim import MFAC


def mean_loss(module: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def toy_data(size: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] + x[:, 1] * x[:, 2] > 0).long())


def toy_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2)).to(dtype)


class Module(LightningModule):
    """Logs, keeps a metric, a counter and batch statistics, and draws random numbers: all of which must survive."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.1), nn.Linear(10, 2))
        self.seen = MeanMetric()
        self.register_buffer("calls", torch.zeros(()))
        self.build = lambda params: optimizer(params, **options)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.seen.update(loss.detach())
        self.calls += 1
        self.log("train/loss", loss, on_step=True)
        self.log("train/seen", self.seen, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.build(self.parameters())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(toy_data(), batch_size=16, shuffle=True)


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "MFAC": (MFAC, {"lr": 0.01, "num_grads": 8, "damping": 1e-2, "momentum": 0.9}),
}


def fit(module: LightningModule, *callbacks: Any, **trainer: Any) -> Trainer:
    settings = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    result = Trainer(**(settings | trainer), callbacks=list(callbacks))
    result.fit(module)
    return result


def small(**options: Any) -> MFACPruning:
    return MFACPruning(**({"num_grads": 12, "batch_size": 8, "block_size": 16, "recomputations": 3} | options))


def weight_zeros(module: nn.Module) -> Tensor:
    return torch.cat([m.weight.flatten() == 0 for m in module.modules() if isinstance(m, nn.Linear)])


# ------------------------------------------------------------------------------------------------------------ the rule


def test_follows_the_rule_step_by_step():
    """One recomputation by hand, with the dense inverse: saliency, ranking, superposed update, exact zeros."""
    net = toy_net(torch.float64)
    data = [(x.double(), y) for x, y in DataLoader(toy_data(), batch_size=8)]
    weights = [net[0].weight, net[2].weight]
    w = torch.cat([p.detach().flatten() for p in weights])
    rows = []
    for batch in data[:7]:
        grads = torch.autograd.grad(mean_loss(net, batch), weights)
        rows.append(torch.cat([g.flatten() for g in grads]))
    G = torch.stack(rows)
    inverse = torch.linalg.inv(1e-3 * torch.eye(len(w)).double() + G.T @ G / 7)
    saliency = w**2 / (2 * inverse.diagonal())
    dropped = saliency.argsort()[: round(0.3 * len(w))]
    x = torch.zeros_like(w)
    x[dropped] = -w[dropped] / inverse.diagonal()[dropped]
    expected = w + inverse @ x
    expected[dropped] = 0

    pruner = MFACPruning(0.3, num_grads=7, damping=1e-3, block_size=None, recomputations=1)
    biases = [net[0].bias.detach().clone(), net[2].bias.detach().clone()]
    pruner.prune(net, mean_loss, data, 0.3)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in weights]), expected)
    assert torch.equal(torch.cat([m.flatten() for m in pruner.masks.values()]), expected != 0)
    assert torch.equal(net[0].bias, biases[0])
    assert torch.equal(net[2].bias, biases[1])


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.8, 0.99])
@pytest.mark.parametrize("recomputations", [1, 5])
def test_the_count_is_exact(scope, sparsity, recomputations):
    net = toy_net()
    pruner = MFACPruning(sparsity, num_grads=5, recomputations=recomputations, scope=scope)
    pruner.prune(net, mean_loss, DataLoader(toy_data(), batch_size=8), sparsity)
    sizes = {"global": [80], "layer": [60, 20]}[scope]
    for zeros, size in zip(weight_zeros(net).split(sizes), sizes, strict=True):
        assert int(zeros.sum()) == round(sparsity * size)
    assert pruner.sparsity == pytest.approx(sum(round(sparsity * n) for n in sizes) / 80)


def test_diagonal_fisher_leaves_kept_weights_alone():
    """With blocks of one coordinate F⁻¹ is diagonal, and so is the update."""
    net = toy_net()
    before = [net[0].weight.detach().clone(), net[2].weight.detach().clone()]
    pruner = MFACPruning(0.5, num_grads=5, block_size=1, recomputations=1)
    pruner.prune(net, mean_loss, DataLoader(toy_data(), batch_size=8), 0.5)
    for old, new, mask in zip(before, [net[0].weight, net[2].weight], pruner.masks.values(), strict=True):
        assert torch.equal(new, old * mask)


def test_one_weight_of_a_quadratic_raises_the_loss_by_its_saliency():
    """Per-sample gradients r_i·x_i of a linear model, r_i = ±1, make F = XᵀX/m + λI the Hessian of the loss below."""
    torch.manual_seed(3)
    m, d, damping = 50, 6, 1e-3
    X, optimum = torch.randn(m, d).double(), torch.randn(1, d).double()
    net = nn.Linear(d, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(optimum)

    def loss(weight: Tensor) -> Tensor:
        step = weight - optimum
        return 0.5 * ((step @ X.T).square().mean() + damping * step.square().sum())

    hessian = X.T @ X / m + damping * torch.eye(d).double()
    saliency = optimum[0] ** 2 / (2 * torch.linalg.inv(hessian).diagonal())
    rows = [x[None] for x in X]  # the gradient of net(x).sum() is x
    pruner = MFACPruning(0.0, num_grads=m, damping=damping, block_size=None, recomputations=1)
    pruner.prune(net, lambda module, batch: module(batch).sum(), rows, 1 / d)
    assert int(net.weight.detach().argmin(dim=1)) >= 0
    assert int(weight_zeros(net).nonzero()) == int(saliency.argmin())
    torch.testing.assert_close(loss(net.weight.detach()), saliency.min())


def test_mask_only_and_ties():
    net = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.5)
    data = [torch.zeros(1, 4)]  # no gradient anywhere: all saliencies are equal
    pruner = MFACPruning(0.5, num_grads=2, update_weights=False, recomputations=1)
    pruner.prune(net, lambda module, batch: module(batch).sum(), data, 0.5)
    assert torch.equal(net.weight.detach(), torch.tensor([[0.0] * 4, [0.5] * 4]))


def test_more_gradients_as_sparsity_grows():
    counts = []

    class Counting(MFACPruning):
        def prune_to(self, sparsity: float, gradients: Any, distributed: bool = False) -> None:
            def counted(m: int, *args: Any) -> Tensor:
                counts.append(m)
                return gradients(m, *args)

            super().prune_to(sparsity, counted, distributed)

    pruner = Counting(0.9, num_grads={0.0: 4, 0.5: 8, 0.8: 12}, recomputations=6)
    pruner.prune(toy_net(), mean_loss, DataLoader(toy_data(), batch_size=8), 0.9)
    fractions = [1 - 0.1 ** (j / 6) for j in range(6)]
    assert counts == [4 if s < 0.5 else 8 if s < 0.8 else 12 for s in fractions]


def test_chosen_parameters_and_tied_weights_once():
    net = toy_net()
    pruner = MFACPruning(0.5, num_grads=4, parameters=["2.*"])
    pruner.prune(net, mean_loss, DataLoader(toy_data(), batch_size=8), 0.5)
    assert set(pruner.masks) == {"2.weight", "2.bias"}
    assert torch.count_nonzero(net[0].weight) == 60
    with pytest.raises(ValueError, match=r"parameters=\['x'\] matches no parameter of Sequential"):
        MFACPruning(0.5, parameters=["x"]).prune(net, mean_loss, [], 0.5)

    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    tied[2].weight = tied[0].weight
    pruner = MFACPruning(0.5, num_grads=4)
    pruner.prune(
        tied, lambda module, batch: module(batch[0]).square().mean(), DataLoader(toy_data(), batch_size=8), 0.5
    )
    assert set(pruner.masks) == {"0.weight"}


def test_targets_must_not_decrease():
    net, data = toy_net(), DataLoader(toy_data(), batch_size=8)
    pruner = MFACPruning(0.5, num_grads=4)
    pruner.prune(net, mean_loss, data, 0.5)
    pruner.prune(net, mean_loss, data, 0.75)  # further is fine
    assert int(weight_zeros(net).sum()) == 60
    with pytest.raises(ValueError, match=r"sparsity 0.5 is below the current 0.75"):
        pruner.prune(net, mean_loss, data, 0.5)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        pruner.prune(net, mean_loss, data, 1.0)
    with pytest.raises(ValueError, match="ended after 0 of num_grads=4"):
        pruner.prune(net, mean_loss, [], 0.8)


def test_export_to_torch_pruning():
    net = toy_net()
    pruner = MFACPruning(0.5, num_grads=4)
    pruner.prune(net, mean_loss, DataLoader(toy_data(), batch_size=8), 0.5)
    x, expected = torch.randn(3, 6), copy.deepcopy(net)
    pruner.to_torch_pruning(net)
    assert prune.is_pruned(net)
    assert torch.equal(net[0].weight_mask.bool(), pruner.masks["0.weight"])
    assert torch.equal(net(x), expected(x))
    prune.remove(net[0], "weight")
    prune.remove(net[2], "weight")
    assert torch.equal(net(x), expected(x))
    assert not prune.is_pruned(net)


# --------------------------------------------------------------------------------------------------------- in a Trainer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_stay_put_under_any_optimizer(name):
    optimizer, options = OPTIMIZERS[name]
    module, pruner = Module(optimizer, **options), small(schedule={1: 0.5, 2: 0.75})

    def check(*args: Any) -> None:
        assert torch.equal(weight_zeros(module), ~torch.cat([m.flatten() for m in pruner.masks.values()]))

    module.on_train_batch_end = check  # type: ignore[method-assign]
    fit(module, pruner, max_epochs=4)
    assert int(weight_zeros(module).sum()) == 60
    assert pruner.state_dict()["done"] == [1, 2]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_momenta_of_dropped_weights_are_zero(name):
    optimizer, options = OPTIMIZERS[name]
    module, pruner = Module(optimizer, **options), small(schedule={1: 0.5})
    trainer = fit(module, pruner, max_epochs=2)
    state = trainer.optimizers[0].state[module.net[0].weight]
    moments = [v for v in state.values() if isinstance(v, Tensor) and v.shape == (10, 6)]
    assert moments
    for moment in moments:
        assert torch.equal(
            moment[~pruner.masks["net.0.weight"]], torch.zeros(int((~pruner.masks["net.0.weight"]).sum()))
        )
        assert moment.count_nonzero() > 0


def test_pruning_disturbs_nothing_else():
    """A run that 'prunes' to sparsity 0, taking gradients on the way, equals the run without it bit for bit."""

    class Look(MFACPruning):
        def prune_to(self, sparsity: float, gradients: Any, distributed: bool = False) -> None:
            kept = torch.arange(3)
            taken.append(gradients(6, list(self._weights.values()), kept))
            super().prune_to(sparsity, gradients, distributed)

    taken: list[Tensor] = []
    results = []
    for callbacks in ([], [Look(schedule={0: 0.0, 1: 0.0, 3: 0.0}, batch_size=8)]):
        seed_everything(5)
        module = Module(torch.optim.Adam, lr=0.01)
        trainer = fit(module, *callbacks)
        results.append((module, trainer, torch.rand(3)))
    (plain, plain_trainer, plain_random), (looked, looked_trainer, looked_random) = results
    assert [g.shape for g in taken] == [(6, 3)] * 3
    for p, q in zip(plain.state_dict().values(), looked.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    assert plain.calls == 18
    assert torch.equal(plain_random, looked_random)
    logged = {k: v for k, v in looked_trainer.callback_metrics.items() if k != "train/sparsity"}
    assert logged == plain_trainer.callback_metrics
    assert looked_trainer.callback_metrics["train/sparsity"] == 0.0
    assert all(module.training for module in looked.modules())
    assert looked.log.__func__ is LightningModule.log  # type: ignore[attr-defined]


def test_an_epoch_equal_to_max_epochs_prunes_after_training():
    module, pruner = Module(lr=0.1), small(schedule={2: 0.5})
    fit(module, pruner, max_epochs=2)
    assert int(weight_zeros(module).sum()) == 40
    with pytest.raises(ValueError, match="schedule has epoch 3, but max_epochs=2"):
        fit(Module(lr=0.1), small(schedule={3: 0.5}), max_epochs=2)


def test_resume_keeps_masks_and_schedule(tmp_path):
    def run(path: str | None) -> tuple[Module, MFACPruning]:
        seed_everything(6)
        module, pruner = Module(torch.optim.SGD, lr=0.1, momentum=0.9), small(schedule={1: 0.5, 2: 0.75, 4: 0.8})
        module.net[3].p = 0.0
        module.train_dataloader = lambda: DataLoader(toy_data(), batch_size=16)  # type: ignore[method-assign]
        checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[pruner, checkpoints],
        )
        trainer.fit(module, ckpt_path=path)
        return module, pruner

    expected, pruner = run(None)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert saved["MFACPruning"]["done"] == [1]
    resumed, resumed_pruner = run(str(tmp_path / "epoch=1.ckpt"))
    for p, q in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert resumed_pruner.state_dict()["done"] == [1, 2, 4]
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, resumed_pruner.masks[name])


def test_a_dense_checkpoint_is_pruned_at_once(tmp_path):
    """A run that continues after the scheduled epoch makes up for it."""
    trainer = fit(Module(lr=0.1), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    module, pruner = Module(lr=0.1), small(schedule={0: 0.25, 1: 0.5})
    Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[pruner],
    ).fit(module, ckpt_path=str(tmp_path / "dense.ckpt"))  # fmt: skip
    assert pruner.state_dict()["done"] == [0, 1]
    assert int(weight_zeros(module).sum()) == 40


def test_criterion_dataloader_and_training_step_without_an_index():
    class Bare(Module):
        def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
            return {"loss": nn.functional.cross_entropy(self.net(batch[0]), batch[1])}

    fit(Bare(lr=0.1), small(target_sparsity=0.5))

    seen = []

    def criterion(module: LightningModule, batch: list[Tensor]) -> Tensor:
        seen.append(len(batch[0]))
        return mean_loss(module.net, batch)

    fit(
        Module(lr=0.1), small(target_sparsity=0.5, criterion=criterion, dataloader=DataLoader(toy_data(), batch_size=5))
    )
    assert set(seen) == {5, 1}
    assert len(seen) == 36


def test_what_it_cannot_do_is_refused():
    class Manual(Module):
        automatic_optimization = False

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(toy_data())

    with pytest.raises(ValueError, match=r"Manual optimizes manually.*pass criterion"):
        fit(Manual(lr=0.1), small(target_sparsity=0.5))
    module = Module(lr=0.1)
    module.train_dataloader = lambda: DataLoader(Stream(), batch_size=4)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="map-style dataset, not DataLoader: pass dataloader"):
        fit(module, small(target_sparsity=0.5))
    module = Module(lr=0.1)
    module.training_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="training_step returned NoneType, not a loss: pass criterion"):
        fit(module, small(target_sparsity=0.5))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_low_precision(precision):
    module = Module(torch.optim.SGD, lr=0.01, momentum=0.9)
    fit(module, small(target_sparsity=0.5), precision=precision)
    assert int(weight_zeros(module).sum()) == 40
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either target_sparsity or schedule"),
        ({"target_sparsity": 0.5, "schedule": {0: 0.5}}, "give either"),
        ({"target_sparsity": 1.0}, r"target_sparsity must hold sparsities in \[0, 1\)"),
        ({"target_sparsity": -0.1}, r"target_sparsity must hold"),
        ({"schedule": {}}, "schedule must hold"),
        ({"schedule": {-1: 0.5}}, "schedule must hold"),
        ({"schedule": {0: 0.5, 2: 0.4}}, "schedule must not decrease"),
        ({"target_sparsity": 0.5, "num_grads": 0}, "num_grads must be >= 1"),
        ({"target_sparsity": 0.5, "num_grads": {0.5: 8}}, "num_grads must be >= 1, or a dict .* from sparsity 0 on"),
        ({"target_sparsity": 0.5, "batch_size": 0}, "batch_size must be >= 1"),
        ({"target_sparsity": 0.5, "block_size": 0}, "block_size must be >= 1"),
        ({"target_sparsity": 0.5, "recomputations": 0}, "recomputations must be >= 1"),
        ({"target_sparsity": 0.5, "damping": 0.0}, "damping must be > 0"),
        ({"target_sparsity": 0.5, "scope": "block"}, "scope must be 'global' or 'layer'"),
        ({"target_sparsity": 0.5, "seed": -1}, "seed must be >= 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MFACPruning(**arguments)


# ------------------------------------------------------------------------------------------------------------ the claim


def dense_digits(seed: int, epochs: int = 40) -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """The dense network of the claim below."""
    digits = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(digits.images / 16).float()[order].flatten(1), torch.tensor(digits.target)[order]
    train, test = TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            mean_loss(net, train[rows]).backward()
            optimizer.step()
    return net, train, test


def accuracy(net: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    return float((net(x).argmax(1) == y).float().mean())


def magnitude_pruned(net: nn.Module, sparsity: float) -> nn.Module:
    result = copy.deepcopy(net)
    layers = [(m, "weight") for m in result.modules() if isinstance(m, nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
    return result


def test_beats_magnitude_pruning_on_digits_without_fine_tuning():
    net, train, test = dense_digits(0, epochs=15)
    assert accuracy(net, test) > 0.9
    pruned = copy.deepcopy(net)
    pruner = MFACPruning(0.8, num_grads=96, recomputations=8)
    pruner.prune(pruned, mean_loss, DataLoader(train, batch_size=16, shuffle=True), 0.8)
    assert accuracy(pruned, test) >= accuracy(magnitude_pruned(net, 0.8), test) + 0.15


@pytest.mark.slow
def test_claim_on_digits_over_ten_seeds():
    """Without fine-tuning, mean and deviation of the test accuracy over ten splits and initialisations (dense 0.975).

    Measured: at 80 % ours 0.970 (0.009), magnitude 0.710 (0.089); at 90 % ours 0.952 (0.009), magnitude 0.345 (0.085).
    """
    found: dict[float, list[tuple[float, float]]] = {0.8: [], 0.9: []}
    for seed in range(10):
        net, train, test = dense_digits(seed)
        for sparsity, pairs in found.items():
            pruned = copy.deepcopy(net)
            loader = DataLoader(train, batch_size=16, shuffle=True)
            MFACPruning(sparsity, num_grads=256, block_size=None).prune(pruned, mean_loss, loader, sparsity)
            pairs.append((accuracy(pruned, test), accuracy(magnitude_pruned(net, sparsity), test)))
    ours, magnitude = ({s: float(torch.tensor(pairs)[:, i].mean()) for s, pairs in found.items()} for i in (0, 1))
    assert ours[0.8] >= 0.95, found
    assert ours[0.8] >= magnitude[0.8] + 0.25, found
    assert ours[0.9] >= 0.9, found


def test_datamodule_of_this_package():
    class Net(Module):
        def __init__(self) -> None:
            super().__init__(torch.optim.Adam, lr=1e-3)
            self.net = MLP(64, [16], 10)

    pruner = small(target_sparsity=0.9, batch_size=16)
    module = Net()
    Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_train_batches=3, callbacks=[pruner],
    ).fit(module, DigitsDataModule())  # fmt: skip
    assert int(weight_zeros(module).sum()) == round(0.9 * (64 * 16 + 160))
    assert math.isclose(pruner.sparsity, 0.9, abs_tol=1e-3)


@pytest.mark.parametrize(
    "average",
    [
        WeightAveraging(),
        EMAWeightAveraging(decay=0.9),
        StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    ],
    ids=lambda average: type(average).__name__,
)
@pytest.mark.parametrize("pruning_first", [True, False])
def test_averages_of_weights_are_pruned_too(tmp_path, average, pruning_first):
    """In the weights that ``fit`` leaves, in those that are validated and in every checkpoint."""
    average, module = copy.deepcopy(average), Module(torch.optim.SGD, lr=0.1)
    pruning = small(schedule={1: 0.5, 2: 0.8})
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callbacks = [pruning, average] if pruning_first else [average, pruning]
    fit(module, *callbacks, checkpoint, max_epochs=4, enable_checkpointing=True)
    assert pruning.sparsity == pytest.approx(0.8, abs=0.01)
    assert weight_zeros(module).float().mean() == pytest.approx(pruning.sparsity)
    for epoch, sparsity in enumerate([0.0, 0.5, 0.8, 0.8]):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        again = Module()
        again.load_state_dict(saved["state_dict"])
        assert weight_zeros(again).float().mean() == pytest.approx(sparsity, abs=0.01)
