"""``torchmetrics.Metric`` subclasses that torchmetrics lacks."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.metrics.ranking import NDCGAtK, RecallAtK, top_unseen_items
    from lit_methods.metrics.regret import DynamicRegret, GradientVariation, PathLength, StaticRegret

__all__ = [
    "DynamicRegret",
    "GradientVariation",
    "NDCGAtK",
    "PathLength",
    "RecallAtK",
    "StaticRegret",
    "top_unseen_items",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "DynamicRegret": "regret",
        "GradientVariation": "regret",
        "NDCGAtK": "ranking",
        "PathLength": "regret",
        "RecallAtK": "ranking",
        "StaticRegret": "regret",
        "top_unseen_items": "ranking",
    },
)
