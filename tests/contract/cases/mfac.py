"""Cases of the family: mfac."""

from lit_methods.callbacks import (
    EmpiricalFisherMonitor,
    MFACPruning,
    PruningCurve,
)
from lit_methods.optim import (
    MFAC,
)
from tests.contract.cases.kinds import TINY, CallbackCase, OptimizerCase, RecipeCase
from tests.standins.idx_files import write_mnist

OPTIMIZERS: dict[str, OptimizerCase] = {
    "lit_methods.optim.MFAC": OptimizerCase(
        MFAC,
        {"lr": 0.05, "num_grads": 8, "damping": 1e-2, "momentum": 0.5, "weight_decay": 1e-3},
        bad=[
            ({"lr": -1.0}, "lr must be"),
            ({"momentum": 1.0}, "momentum must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
            ({"num_grads": 0}, "num_grads must be"),
            ({"damping": 0.0}, "damping must be"),
            ({"history_dtype": "int8"}, "history_dtype must be"),
            ({"window_scale": "half"}, "window_scale must be"),
            ({"solver": "lu"}, "solver must be"),
            ({"solver": "rank2", "window_scale": "filled"}, "needs window_scale"),
        ],
    ),
}


CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.EmpiricalFisherMonitor": CallbackCase(
        lambda: EmpiricalFisherMonitor(num_grads=4, batch_size=6),
        bad=[
            (lambda: EmpiricalFisherMonitor(num_grads=0), "num_grads must be"),
            (lambda: EmpiricalFisherMonitor(batch_size=0), "batch_size must be"),
            (lambda: EmpiricalFisherMonitor(num_eigenvalues=0), "num_eigenvalues must be"),
            (lambda: EmpiricalFisherMonitor(every_n_epochs=0), "every_n_epochs must be"),
            (lambda: EmpiricalFisherMonitor(seed=-1), "seed must be"),
        ],
    ),
    "lit_methods.callbacks.MFACPruning": CallbackCase(
        lambda: MFACPruning(schedule={0: 0.25, 1: 0.5}, num_grads=4, batch_size=6, recomputations=2),
        bad=[
            (MFACPruning, "target_sparsity or schedule"),
            (lambda: MFACPruning(1.0), "target_sparsity must"),
            (lambda: MFACPruning(schedule={1: 0.5, 2: 0.4}), "schedule must not decrease"),
            (lambda: MFACPruning(0.5, num_grads=0), "num_grads must be"),
            (lambda: MFACPruning(0.5, batch_size=0), "batch_size must be"),
            (lambda: MFACPruning(0.5, damping=0.0), "damping must be"),
            (lambda: MFACPruning(0.5, block_size=0), "block_size must be"),
            (lambda: MFACPruning(0.5, recomputations=0), "recomputations must be"),
            (lambda: MFACPruning(0.5, scope="row"), "scope must be"),  # type: ignore[arg-type]
            (lambda: MFACPruning(0.5, seed=-1), "seed must be"),
        ],
    ),
    "lit_methods.callbacks.PruningCurve": CallbackCase(
        lambda: PruningCurve("test_loss", [0.5], [1], num_grads=4, batch_size=6),
        bad=[(lambda: PruningCurve("test_loss", [], [1]), "sparsities and recomputations must not be empty")],
        not_applicable={
            "check_state_survives_a_checkpoint": "It keeps nothing between steps: it works after training has ended."
        },
    ),
}


RECIPES: dict[str, RecipeCase] = {
    "mfac/digits": RecipeCase(TINY),
    "mfac/fashion_mnist": RecipeCase(
        [*TINY, "--data.data_dir=.", "--data.val_size=8", "--data.batch_size=8"], prepare=write_mnist
    ),
    "mfac/prune_digits": RecipeCase(
        TINY, callbacks={"PruningCurve": {"sparsities": [0.5], "recomputations": [1], "num_grads": 16}}
    ),
    "mfac/prune_fashion_mnist": RecipeCase(
        [*TINY, "--data.data_dir=.", "--data.val_size=8", "--data.batch_size=8"],
        prepare=write_mnist,
        callbacks={"MFACPruning": {"schedule": {0: 0.5, 1: 0.75}, "num_grads": 16, "recomputations": 2}},
    ),
}
