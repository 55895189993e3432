"""Cases of the family: transport."""

import torch

from lit_methods.callbacks import (
    TransportTable,
)
from lit_methods.datamodules import (
    DigitPointsDataModule,
)
from lit_methods.nets import MLP
from lit_methods.transport import OTGenerator, PointRegistration
from tests.contract.cases.kinds import (
    ADAM,
    LOADER_ARGUMENTS,
    TINY,
    CallbackCase,
    DataModuleCase,
    ModuleCase,
    RecipeCase,
    class_config,
)
from tests.standins.idx_files import write_mnist

MODULES: dict[str, ModuleCase] = {
    "lit_methods.transport.PointRegistration": ModuleCase(
        config={
            "model": class_config("lit_methods.transport.PointRegistration", optimizer=ADAM),
            "data": class_config(
                "lit_methods.datamodules.DigitPointsDataModule", num_points=6, batch_size=4, test_size=20
            ),
        },
        make=lambda: PointRegistration(),
        forward_inputs=lambda: (torch.ones(2, 5, 2),),
        bad=[
            (lambda: PointRegistration(0), "dimensions must be"),
            (lambda: PointRegistration(eta=0.0), "eta must be"),
        ],
    ),
    "lit_methods.transport.OTGenerator": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.transport.OTGenerator",
                network=class_config("lit_methods.nets.MLP", in_features=3, hidden_features=[8], out_features=64),
                latent_features=3,
            ),
            "data": class_config("lit_methods.datamodules.DigitsDataModule", batch_size=16, test_size=20),
        },
        make=lambda: OTGenerator(MLP(3, [8], 64), latent_features=3),
        forward_inputs=lambda: (torch.ones(2, 3),),
        bad=[
            (lambda: OTGenerator(MLP(3, [8], 64), 0), "latent_features must be"),
            (lambda: OTGenerator(MLP(3, [8], 64), 3, eta=-1.0), "eta must be"),
        ],
    ),
}


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.DigitPointsDataModule": DataModuleCase(
        lambda folder, **arguments: DigitPointsDataModule(**({"num_points": 5} | arguments)),
        bad=[
            *LOADER_ARGUMENTS,
            ({"num_points": 0}, "num_points=0: must be"),
            ({"angle": float("nan")}, "angle=nan: must be"),
            ({"shift": (0.0, float("inf"))}, "shift=.*: must be"),
            ({"test_size": 1797}, "test_size=1797: must be"),
        ],
    ),
}


CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.TransportTable": CallbackCase(
        lambda: TransportTable(eta=50.0, assignment_size=10, image_size=4),
        bad=[
            (lambda: TransportTable(eta=0.0), "eta must be"),
            (lambda: TransportTable(assignment_size=0), "assignment_size must be"),
            (lambda: TransportTable(image_size=1), "image_size must be"),
            (lambda: TransportTable(tol=0.0), "tol must be"),
            (lambda: TransportTable(max_sweeps=0), "max_sweeps must be"),
            (lambda: TransportTable(seed=-1), "seed must be"),
        ],
    ),
}


RECIPES: dict[str, RecipeCase] = {
    "sinkhorn_newton_sparse/registration": RecipeCase(TINY),
    "sinkhorn_newton_sparse/fashion_mnist": RecipeCase(
        [
            *TINY,
            "--data.data_dir=.",
            "--data.val_size=8",
            "--data.batch_size=8",
            "--trainer.callbacks.assignment_size=20",
            "--trainer.callbacks.image_size=6",
            "--trainer.callbacks.eta=100",
        ],
        prepare=write_mnist,
    ),
    "sinkhorn_newton_sparse/tables": RecipeCase(
        [
            *TINY,
            "--data.batch_size=16",
            "--trainer.callbacks.assignment_size=20",
            "--trainer.callbacks.image_size=6",
            "--trainer.callbacks.eta=100",
        ]
    ),
}
