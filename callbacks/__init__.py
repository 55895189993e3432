"""Lightning callbacks."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.callbacks.convergence_rates import ConvergenceRates
    from lit_methods.callbacks.exact_resume import ExactResume
    from lit_methods.callbacks.factor_rebalancing import FactorRebalancing
    from lit_methods.callbacks.learning_curves import LearningCurves
    from lit_methods.callbacks.result_table import ResultTable

__all__ = ["ConvergenceRates", "ExactResume", "FactorRebalancing", "LearningCurves", "ResultTable"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "ConvergenceRates": "convergence_rates",
        "ExactResume": "exact_resume",
        "FactorRebalancing": "factor_rebalancing",
        "LearningCurves": "learning_curves",
        "ResultTable": "result_table",
    },
)
