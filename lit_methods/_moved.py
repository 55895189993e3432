"""Modules of version 0.0 under their former names, for one release: importing one warns and gives the new one."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "lit_methods.llm.nash_loss": "lit_methods.llm.nash_mp",
    "lit_methods.black_box.langevin": "lit_methods.optim.langevin",
    "lit_methods.optim.armijo_sgd": "lit_methods.optim.sso",
    "lit_methods.optim.cbo_variants": "lit_methods.optim.cbo",
    "lit_methods.optim.extragradient": "lit_methods.optim.optimistic",
    "lit_methods.optim.fisher_inverse": "lit_methods.optim.mfac",
    "lit_methods.optim.implicit_omd": "lit_methods.optim.optimistic",
    "lit_methods.optim.optimistic_adam": "lit_methods.optim.optimistic",
    "lit_methods.optim.optimistic_ensemble": "lit_methods.optim.optimistic",
    "lit_methods.optim.optimistic_ftrl": "lit_methods.optim.optimistic",
    "lit_methods.optim.optimistic_newton": "lit_methods.optim.optimistic",
    "lit_methods.optim.optimistic_omd": "lit_methods.optim.optimistic",
}
for _old, _new in {
    "cifar": "images", "digit_points": "images", "digits": "images", "mnist": "images",
    "breast_cancer": "tables", "covertype": "tables", "libsvm": "tables",
    "glue": "text", "prompts": "text", "word_game": "text",
    "d4rl": "rl", "environments": "rl", "imitation": "rl", "recordings": "rl", "replay": "rl", "rollouts": "rl",
    "interaction_sets": "interactions", "matrix_factorization": "synthetic", "sea": "synthetic", "sensing": "synthetic",
}.items():  # fmt: skip
    MOVED[f"lit_methods.datamodules.{_old}"] = "lit_methods.datamodules"
for _old in (
    "cbo_cooling", "empirical_fisher_monitor", "export_hf", "factor_rebalancing", "landscape_paths", "mfac_pruning",
    "policy_evaluation", "policy_frames", "pruning_curve", "sample_table", "sft_warmup", "surrogate_monitor",
    "target_capture", "transport_table", "win_rate",
):  # fmt: skip
    MOVED[f"lit_methods.callbacks.{_old}"] = "lit_methods.callbacks"


class _Forward(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} has moved: import from {new}", FutureWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


def warn_on_import() -> None:
    """Find the former names, after everything that really exists."""
    sys.meta_path.append(_Forward())
