"""Lightning callbacks."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.callbacks.empirical_fisher_monitor import EmpiricalFisherMonitor
    from lit_methods.callbacks.exact_resume import ExactResume
    from lit_methods.callbacks.learning_curves import LearningCurves
    from lit_methods.callbacks.mfac_pruning import MFACPruning
    from lit_methods.callbacks.result_table import ResultTable

__all__ = ["EmpiricalFisherMonitor", "ExactResume", "LearningCurves", "MFACPruning", "ResultTable"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "EmpiricalFisherMonitor": "empirical_fisher_monitor",
        "ExactResume": "exact_resume",
        "LearningCurves": "learning_curves",
        "MFACPruning": "mfac_pruning",
        "ResultTable": "result_table",
    },
)
