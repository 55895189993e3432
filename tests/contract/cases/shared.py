"""Cases of the family: shared."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lit_methods.batches import SupervisedBatch
from lit_methods.callbacks import (
    ConvergenceCurves,
    ConvergenceRates,
    ExactResume,
    LastCheckpoint,
    LearningCurves,
    ResultTable,
)
from lit_methods.datamodules import (
    BreastCancerDataModule,
    TensorDataModule,
)
from lit_methods.nets import MLP
from lit_methods.supervised import SupervisedModule
from tests.contract.cases.kinds import LOADER_ARGUMENTS, CallbackCase, DataModuleCase, ModuleCase, class_config


def _tensors(folder: Path, **arguments: Any) -> LightningDataModule:
    rows = SupervisedBatch(torch.arange(40.0)[:, None], torch.arange(40) % 3)
    return TensorDataModule(train=rows, val=rows, test=rows, **({"batch_size": 4} | arguments))


MODULES: dict[str, ModuleCase] = {
    "lit_methods.supervised.SupervisedModule": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.supervised.SupervisedModule",
                network=class_config("lit_methods.nets.MLP", in_features=64, hidden_features=[16], out_features=10),
                num_classes=10,
                optimizer=class_config("lit_methods.optim.MFAC", lr=1e-2, num_grads=4, damping=1e-3, momentum=0.9),
                lr_scheduler=class_config("torch.optim.lr_scheduler.StepLR", step_size=1),
            ),
            "data": class_config("lit_methods.datamodules.DigitsDataModule", batch_size=32),
        },
        make=lambda: SupervisedModule(MLP(64, [16], 10), num_classes=10),
        forward_inputs=lambda: (torch.ones(2, 1, 8, 8),),
        bad=[(lambda: SupervisedModule(MLP(4, [], 1), num_classes=1), "num_classes must be")],
    ),
}


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.BreastCancerDataModule": DataModuleCase(
        lambda folder, **arguments: BreastCancerDataModule(**arguments),
        bad=[*LOADER_ARGUMENTS, ({"test_size": 569}, "test_size=569: must be")],
    ),
    "lit_methods.datamodules.TensorDataModule": DataModuleCase(_tensors, bad=LOADER_ARGUMENTS[:3]),
}


CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.ConvergenceRates": CallbackCase(
        lambda: ConvergenceRates(["loss", "val_loss"]),
        bad=[
            (lambda: ConvergenceRates([]), "metrics must name"),
            (lambda: ConvergenceRates(["loss"], from_step=0), "from_step must be"),
            (lambda: ConvergenceRates(["loss"], floor=0.0), "floor must be"),
        ],
    ),
    "lit_methods.callbacks.ExactResume": CallbackCase(ExactResume, bad=[]),
    "lit_methods.callbacks.ConvergenceCurves": CallbackCase(
        lambda: ConvergenceCurves(["kl"]),
        bad=[
            (lambda: ConvergenceCurves([]), "groups must name"),
            (lambda: ConvergenceCurves(["kl"], name="a/b"), "name must be"),
        ],
    ),
    "lit_methods.callbacks.LastCheckpoint": CallbackCase(
        LastCheckpoint,
        bad=[
            (lambda: LastCheckpoint(every_n_epochs=0), "every_n_epochs must be"),
            (lambda: LastCheckpoint(every_n_steps=0), "every_n_steps must be"),
        ],
        not_applicable={
            "check_attaches_to_an_unrelated_module": (
                "It refuses a second writer of last.ckpt, which the check has; "
                "tests/unit/callbacks/test_checkpoints.py attaches it to unrelated modules."
            ),
            "check_state_survives_a_checkpoint": "It keeps nothing of its own: it counts from where a run begins.",
        },
    ),
    "lit_methods.callbacks.LearningCurves": CallbackCase(
        LearningCurves,
        bad=[
            (lambda: LearningCurves(metrics=[]), "metrics must name"),
            (lambda: LearningCurves(name="a/b"), "name must be"),
        ],
    ),
    "lit_methods.callbacks.ResultTable": CallbackCase(
        ResultTable,
        bad=[(lambda: ResultTable(stage="fit"), "stage must be")],
        not_applicable={
            "check_state_survives_a_checkpoint": "It keeps nothing between steps: its results come after fit has ended."
        },
    ),
}
