"""One case per public piece: how to build it, what it must refuse, and why a check does not apply."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor
from torch.optim import Optimizer

Arguments = dict[str, Any]


@dataclass(frozen=True)
class OptimizerCase:
    """``arguments`` must suit small problems; ``bad`` pairs one wrong argument with a pattern of the error."""

    optimizer: type[Optimizer]
    arguments: Arguments
    bad: list[tuple[Arguments, str]]
    closure_calls: int = 1
    not_applicable: dict[str, str] = field(default_factory=dict)

    def make(self, params: Any, **overrides: Any) -> Optimizer:
        """Build the optimizer."""
        return self.optimizer(params, **(self.arguments | overrides))


@dataclass(frozen=True)
class ModuleCase:
    """``config`` is a CLI config of module and datamodule; ``make`` builds the module directly, without the CLI."""

    config: dict[str, Any]
    make: Callable[[], LightningModule]
    forward_inputs: Callable[[], tuple[Tensor, ...]]
    bad: list[tuple[Callable[[], object], str]]
    not_applicable: dict[str, str] = field(default_factory=dict)


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


@dataclass(frozen=True)
class RecipeCase:
    """``overrides`` make a tiny run of a small or slow recipe; ``prepare`` fills a folder with its data first."""

    overrides: list[str]
    prepare: Callable[[Path], None] = lambda folder: None
