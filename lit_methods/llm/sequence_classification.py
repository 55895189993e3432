"""Fine-tuning a pretrained encoder to classify texts, or to give each text (or pair of texts) a number."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassConfusionMatrix

from lit_methods.batches import TokenBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.precision import load_unrounded

try:
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        PreTrainedConfig,
        PreTrainedModel,
        get_linear_schedule_with_warmup,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('SequenceClassification needs transformers: pip install "lit-methods[llm]"') from error


class SequenceClassification(LightningModule):
    """A ``transformers`` encoder with a classification head, trained on :class:`~lit_methods.batches.TokenBatch`.

    Logs ``train/loss`` per step and ``{val,test}/loss`` and ``{val,test}/<metric>`` per epoch. The arguments for GLUE:
    ``num_labels`` 3 for mnli, ``None`` for stsb, else 2; ``metrics`` ``[matthews]`` for cola, ``[accuracy, f1]`` for
    mrpc and qqp, ``[pearson, spearman]`` for stsb, else ``[accuracy]``.

    Args:
        model: folder or hub id of a pretrained model, whose head is new and random; or its configuration's fields with
            ``model_type``, for random weights.
        num_labels: number of classes, >= 2; ``None`` for regression by mean squared error.
        metrics: names among ``accuracy``, ``f1`` (of class 1, two classes) and ``matthews`` for classification,
            ``pearson`` and ``spearman`` for regression; default ``[accuracy]`` or ``[pearson, spearman]``.
        architecture: configuration fields with ``model_type`` that a loaded model must have; those that its own
            configuration leaves out are taken from here.
        warmup: ``None`` for constant learning rates; else they rise linearly from 0 in the first ``warmup`` of all
            optimizer steps, in [0, 1), and fall linearly to 0 in the rest.
        optimizer: builds the optimizer from the trainable parameters.

    Raises:
        ValueError: for an argument out of range, a configuration without ``model_type``, a loaded model that differs
            from ``architecture``, or ``warmup`` in a run without an end.
        ModuleNotFoundError: when ``transformers`` is missing.

    Example:
        >>> tiny = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
        >>> module = SequenceClassification(tiny, num_labels=3)
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        num_labels: int | None = 2,
        metrics: list[str] | None = None,
        architecture: dict[str, Any] | None = None,
        warmup: float | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5),
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        if num_labels is not None and num_labels < 2:
            raise ValueError(f"num_labels must be at least 2, or None for regression, got {num_labels}")
        if warmup is not None and not 0 <= warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), or None for constant learning rates, got {warmup}")
        collection = MetricCollection(dict(_metrics(metrics, num_labels)))
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.num_labels = num_labels
        self.network = _load(model, num_labels or 1, architecture).train()  # loaded models are in evaluation mode
        self._takes_token_types = "token_type_ids" in inspect.signature(self.network.forward).parameters
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")
        self.warmup = warmup
        self.optimizer = optimizer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Logits ``(batch, num_labels)``, or values ``(batch,)``, from tensors like those of the batch."""
        types = {"token_type_ids": token_type_ids} if self._takes_token_types else {}
        logits = self.network(input_ids=input_ids, attention_mask=attention_mask, **types).logits.float()
        return logits.squeeze(-1) if self.num_labels is None else logits

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Mean loss of one batch."""
        loss = self._loss(self(*batch[:3]), batch.labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Class probabilities ``(batch, num_labels)``, or values ``(batch,)``."""
        outputs = self(*batch[:3])
        return outputs if self.num_labels is None else outputs.softmax(-1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The injected optimizer over the trainable parameters, with the schedule of ``warmup`` if there is one."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.warmup is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(f"warmup={self.warmup} needs a run with an end: set the Trainer's max_epochs or max_steps")
        scheduler = get_linear_schedule_with_warmup(optimizer, math.ceil(self.warmup * steps), int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, batch: TokenBatch, stage: str, metrics: MetricCollection) -> None:
        outputs = self(*batch[:3])
        metrics.update(outputs if self.num_labels is None else outputs.argmax(-1), batch.labels)
        loss = self._loss(outputs, batch.labels)
        self.log(f"{stage}/loss", loss, sync_dist=True, batch_size=len(batch.labels))
        self.log_dict(metrics)

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return mse_loss(outputs, labels) if self.num_labels is None else cross_entropy(outputs, labels)


class _Matthews(MulticlassConfusionMatrix):
    """Matthews correlation coefficient; 0 for a constant guess, as GLUE has it (torchmetrics' own is not 0 there)."""

    def compute(self) -> Tensor:
        confusion = self.confmat.double()
        truth, guessed, total = confusion.sum(1), confusion.sum(0), confusion.sum()
        covariance = total * confusion.trace() - truth @ guessed
        scale = ((total**2 - truth @ truth) * (total**2 - guessed @ guessed)).sqrt()
        return torch.where(scale > 0, covariance / scale, 0).float()


_CLASSIFICATION: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda num_labels: MulticlassAccuracy(num_labels, average="micro"),
    "f1": lambda num_labels: BinaryF1Score(),
    "matthews": _Matthews,
}
_REGRESSION: dict[str, Callable[[], Metric]] = {"pearson": PearsonCorrCoef, "spearman": SpearmanCorrCoef}


def _metrics(names: Sequence[str] | None, num_labels: int | None) -> dict[str, Metric]:
    if num_labels is None:
        names = list(_REGRESSION) if names is None else names
        allowed = list(_REGRESSION)
    else:
        names = ["accuracy"] if names is None else names
        allowed = [name for name in _CLASSIFICATION if name != "f1" or num_labels == 2]
    if not names or not set(names) <= set(allowed):
        raise ValueError(f"metrics must name some of {allowed} for num_labels={num_labels}, got {names}")
    if num_labels is None:
        return {name: _REGRESSION[name]() for name in names}
    return {name: _CLASSIFICATION[name](num_labels) for name in names}


def _load(model: str | Mapping[str, Any], outputs: int, architecture: Mapping[str, Any] | None) -> PreTrainedModel:
    if not isinstance(model, str):
        config = _config(model, "model", outputs)
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    if architecture is None:
        config = AutoConfig.from_pretrained(model, num_labels=outputs)
    else:
        found, _ = PreTrainedConfig.get_config_dict(model)
        for key, expected in architecture.items():
            if key in found and found[key] != expected:
                raise ValueError(f"architecture says {key}={expected!r}, but {model} has {found[key]!r}")
        config = _config({**found, **architecture}, "architecture", outputs)
    return AutoModelForSequenceClassification.from_pretrained(model, config=config, dtype=torch.float32)


def _config(fields: Mapping[str, Any], argument: str, outputs: int) -> PreTrainedConfig:
    if "model_type" not in fields:
        raise ValueError(f"{argument} has no model_type among {sorted(fields)}; give the family, such as bert")
    return AutoConfig.for_model(**{**fields, "num_labels": outputs})
