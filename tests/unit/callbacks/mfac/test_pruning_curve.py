import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.nn.utils import prune

from lit_methods.callbacks import PruningCurve
from lit_methods.datamodules import DigitsDataModule
from lit_methods.nets import MLP
from lit_methods.supervised import SupervisedModule


def test_every_method_is_tested_from_the_dense_weights(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    module = SupervisedModule(MLP(64, [32], 10), num_classes=10, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    data = DigitsDataModule()
    curve = PruningCurve("test/accuracy", sparsities=[0.0, 0.9], recomputations=[1, 4], num_grads=32)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        **quiet,
        max_epochs=4,
        callbacks=[curve],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)

    x, y = data.test_data

    def accuracy(network: torch.nn.Module) -> float:
        return (network(x).argmax(1) == y).float().mean().item()

    dense = accuracy(module)
    assert curve.results["dense"] == {0.0: pytest.approx(dense)}
    methods = ["M-FAC", "M-FAC, 4 recomputations", "magnitude"]
    assert list(curve.results) == ["dense", *methods]
    for method in methods:
        assert curve.results[method][0.0] == pytest.approx(dense)
        assert curve.results[method][0.9] < dense

    by_hand = copy.deepcopy(module.network)
    places = [(by_hand[1], "weight"), (by_hand[3], "weight")]
    prune.global_unstructured(places, prune.L1Unstructured, amount=0.9)
    assert curve.results["magnitude"][0.9] == pytest.approx(accuracy(by_hand))

    out = capsys.readouterr().out
    assert out.count("magnitude") == 1
    assert f"{curve.results['M-FAC'][0.9]:.4f}" in out
    assert (tmp_path / "pruning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert trainer.state.fn == "fit"


def test_empty_lists_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsities=\[\]"):
        PruningCurve("test/accuracy", sparsities=[], recomputations=[1])
    with pytest.raises(ValueError, match="target_sparsity must"):
        PruningCurve("test/accuracy", sparsities=[1.0], recomputations=[1])


@pytest.mark.parametrize("curve_first", [True, False])
def test_beside_an_average_of_weights(tmp_path, curve_first) -> None:
    """It prunes the average and leaves it, in the module and in the callback that keeps it; or it is refused."""
    torch.manual_seed(0)
    module = SupervisedModule(MLP(64, [8], 10), num_classes=10)
    curve = PruningCurve("test/accuracy", sparsities=[0.5], recomputations=[1], num_grads=8)
    average = EMAWeightAveraging(decay=0.9)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        **quiet,
        max_epochs=1,
        callbacks=[curve, average] if curve_first else [average, curve],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    if curve_first:
        with pytest.raises(ValueError, match="PruningCurve must come after EMAWeightAveraging"):
            trainer.fit(module, DigitsDataModule())
        return
    trainer.fit(module, DigitsDataModule())
    kept = dict(average._average_model.module.named_parameters())
    for name, p in module.named_parameters():
        assert torch.equal(p, kept[name])
        assert (p != 0).all()
