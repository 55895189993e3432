"""The kinds of case, and what cases of several families share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

Arguments = dict[str, Any]


@dataclass(frozen=True)
class OptimizerCase:
    """``arguments`` must suit small problems; ``bad`` pairs one wrong argument with a pattern of the error."""

    optimizer: type[Optimizer]
    arguments: Arguments
    bad: list[tuple[Arguments, str]]
    closure_calls: int = 1
    host_syncs: bool = False  # whether the docstring declares host synchronisations
    draws_noise: bool = False  # whether steps are random: devices have different streams of random numbers
    module_argument: str | None = None  # the constructor's name for the module that holds the parameters
    may_be_infinite: frozenset[str] = frozenset()  # arguments
    not_applicable: dict[str, str] = field(default_factory=dict)

    def make(self, params: Any, module: nn.Module, **overrides: Any) -> Optimizer:
        """Build the optimizer of (some of) the module's parameters."""
        given = {self.module_argument: module} if self.module_argument else {}
        return self.optimizer(params, **(self.arguments | given | overrides))


@dataclass(frozen=True)
class ModuleCase:
    """``config`` is a CLI config of module and datamodule; ``make`` builds the module directly, without the CLI.

    ``prepare`` fills the working folder of a run with the data that ``config`` reads.
    """

    config: dict[str, Any]
    make: Callable[[], LightningModule]
    forward_inputs: Callable[[], tuple[Tensor, ...]]
    bad: list[tuple[Callable[[], object], str]]
    not_applicable: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Path], None] = lambda folder: None
    trainer: dict[str, Any] = field(default_factory=dict)  # what the datamodule asks of the Trainer
    may_be_infinite: frozenset[str] = frozenset()  # arguments


@dataclass(frozen=True)
class DataModuleCase:
    """``make`` gets an empty folder, fills it with what the datamodule reads, and passes keyword arguments on."""

    make: Callable[..., LightningDataModule]
    bad: list[tuple[Arguments, str]]
    not_applicable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CallbackCase:
    """``make`` builds the callback for a two-epoch fit of an unrelated module."""

    make: Callable[[], Callback]
    bad: list[tuple[Callable[[], object], str]]
    not_applicable: dict[str, str] = field(default_factory=dict)
    accelerator: str = "cpu"


@dataclass(frozen=True)
class RecipeCase:
    """A tiny run of a small or slow recipe.

    ``overrides`` leave it two epochs, so that it can be killed in the second; ``callbacks`` holds settings of some of
    its callbacks, by class name; ``prepare`` fills a folder with its data.
    """

    overrides: list[str]
    prepare: Callable[[Path], None] = lambda folder: None
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)


def class_config(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


ADAM = class_config("torch.optim.Adam", lr=1e-3)

LOADER_ARGUMENTS: list[tuple[Arguments, str]] = [
    ({"batch_size": 0}, "batch_size=0: must be an integer >= 1"),
    ({"num_workers": -1}, "num_workers=-1: must be"),
    ({"seed": -1}, "seed=-1: must be"),
    ({"val_size": -1}, "val_size=-1: must be"),
]

TINY = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2"]
