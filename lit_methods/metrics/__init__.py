"""``torchmetrics.Metric`` subclasses that torchmetrics lacks."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.metrics.regret import DynamicRegret, GradientVariation, PathLength, StaticRegret

__all__ = ["DynamicRegret", "GradientVariation", "PathLength", "StaticRegret"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "DynamicRegret": "regret",
        "GradientVariation": "regret",
        "PathLength": "regret",
        "StaticRegret": "regret",
    },
)
