"""Lightning callbacks."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.callbacks.exact_resume import ExactResume
    from lit_methods.callbacks.learning_curves import LearningCurves
    from lit_methods.callbacks.result_table import ResultTable

__all__ = ["ExactResume", "LearningCurves", "ResultTable"]

__getattr__, __dir__ = lazy_exports(
    __name__, {"ExactResume": "exact_resume", "LearningCurves": "learning_curves", "ResultTable": "result_table"}
)
