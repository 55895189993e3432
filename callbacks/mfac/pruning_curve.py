"""What pruning costs: a metric against sparsity, M-FAC next to magnitude pruning."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from matplotlib.figure import Figure
from torch import Tensor

from lit_methods.callbacks.evaluation import evaluate_after_fit
from lit_methods.callbacks.figures import output_dir, save_figure
from lit_methods.callbacks.mfac.pruning import MFACPruning


class PruningCurve(Callback):
    """Prune the trained network to several sparsities, each time from the dense weights, and test without fine-tuning.

    When training ends, every sparsity is reached by :class:`~lit_methods.callbacks.MFACPruning` with each number of
    recomputations and by global magnitude pruning (of the same layers). After ``fit`` the test
    loop runs once for each; the table is printed on rank zero and drawn as ``pruning_curve.png``. The module is left
    dense.

    Args:
        metric: name of the metric that the module's test loop logs.
        sparsities: fractions of the prunable weights to drop, in [0, 1).
        recomputations: how often M-FAC takes new gradients on the way to a sparsity; one curve each.
        num_grads: see :class:`~lit_methods.callbacks.MFACPruning`, like the others below.
        batch_size: samples per gradient.
        damping: λ of the Fisher.
        block_size: coordinates per diagonal block of the Fisher; None for the full matrix.
        seed: of the draw of gradients.

    Attributes:
        results: method -> sparsity -> metric; ``dense`` has sparsity 0.

    Raises:
        ValueError: an argument out of range; when ``fit`` starts, a callback that averages weights and comes after this
            one, so that it would not be its average that is pruned.
    """

    def __init__(
        self,
        metric: str,
        sparsities: list[float],
        recomputations: list[int],
        num_grads: int = 256,
        batch_size: int = 16,
        damping: float = 1e-5,
        block_size: int | None = 128,
        seed: int = 0,
    ) -> None:
        if not sparsities or not recomputations:
            raise ValueError(
                f"sparsities and recomputations must not be empty, got sparsities={sparsities} and "
                f"recomputations={recomputations}"
            )
        self.metric = metric
        self.sparsities = sparsities
        self.results: dict[str, dict[float, float]] = {}
        self._pruners = {
            (_label(r), s): MFACPruning(
                target_sparsity=s,
                num_grads=num_grads,
                batch_size=batch_size,
                damping=damping,
                block_size=block_size,
                recomputations=r,
                seed=seed,
            )
            for r in recomputations
            for s in sparsities
        }
        self._weights: dict[tuple[str, float], dict[str, Tensor]] = {}

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Refuse callbacks that would put an average in the place of the weights after they were pruned."""
        for callback in trainer.callbacks[trainer.callbacks.index(self) :]:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ValueError(f"PruningCurve must come after {type(callback).__name__}, whose average it prunes")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, while there are training batches to take gradients of."""
        dense = _copy(pl_module)
        self._weights = {("dense", 0.0): dense}
        for (method, sparsity), pruner in self._pruners.items():
            for run in (pruner.on_train_start, pruner.on_train_end):
                run(trainer, pl_module)
            pruner.teardown(trainer, pl_module, "fit")
            self._weights[method, sparsity] = _copy(pl_module)
            pl_module.load_state_dict(dense)
        names = next(iter(self._pruners.values())).masks
        for sparsity in self.sparsities:
            self._weights["magnitude", sparsity] = _prune_by_magnitude(pl_module, list(names), sparsity)
            pl_module.load_state_dict(dense)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test every pruned network, print and draw."""
        folder = output_dir(trainer)
        for (method, sparsity), weights in self._weights.items():
            pl_module.load_state_dict(weights)
            metrics = evaluate_after_fit(trainer, pl_module)
            self.results.setdefault(method, {})[sparsity] = metrics[self.metric]
        pl_module.load_state_dict(self._weights["dense", 0.0])
        self._weights = {}
        if trainer.is_global_zero:
            print(self._table())
            self._draw(trainer, folder)

    def _table(self) -> str:
        (dense,) = self.results["dense"].values()
        methods = [method for method in self.results if method != "dense"]
        lines = [f"\n{self.metric} after pruning without fine-tuning (dense: {dense:.4f})"]
        lines.append("sparsity  " + "  ".join(f"{method:<6}" for method in methods))
        for s in self.sparsities:
            lines.append(f"{s:<8}  " + "  ".join(f"{self.results[m][s]:<{max(6, len(m))}.4f}" for m in methods))
        return "\n".join(lines)

    def _draw(self, trainer: Trainer, folder: Path) -> None:
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        (dense,) = self.results["dense"].values()
        axes.axhline(dense, color="grey", linestyle=":", label="dense")
        for method, points in self.results.items():
            if method != "dense":
                axes.plot(list(points), list(points.values()), marker="o", label=method)
        axes.set(xlabel="sparsity", ylabel=self.metric)
        axes.legend()
        axes.grid(alpha=0.3)
        save_figure(trainer, figure, "pruning_curve", folder)


def _label(recomputations: int) -> str:
    return "M-FAC" if recomputations == 1 else f"M-FAC, {recomputations} recomputations"


def _copy(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def _prune_by_magnitude(module: LightningModule, names: list[str], sparsity: float) -> dict[str, Tensor]:
    weights = [module.get_parameter(name) for name in names]
    sizes = torch.cat([p.flatten().abs() for p in weights])
    mask = torch.ones_like(sizes, dtype=torch.bool)
    mask[sizes.topk(round(sparsity * len(sizes)), largest=False).indices] = False
    for p, kept in zip(weights, mask.split([p.numel() for p in weights]), strict=True):
        p.mul_(kept.view_as(p))
    return _copy(module)
