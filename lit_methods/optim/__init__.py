"""Optimizers for any torch model; nothing here imports lightning."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.optim.fisher_inverse import FisherInverse, collect_gradients
    from lit_methods.optim.mdpo import MDPO, MDPOStepSize
    from lit_methods.optim.mfac import MFAC
    from lit_methods.optim.schedules import PiecewiseConstantLR

__all__ = ["MDPO", "MFAC", "FisherInverse", "MDPOStepSize", "PiecewiseConstantLR", "collect_gradients"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "FisherInverse": "fisher_inverse",
        "MDPO": "mdpo",
        "MDPOStepSize": "mdpo",
        "MFAC": "mfac",
        "PiecewiseConstantLR": "schedules",
        "collect_gradients": "fisher_inverse",
    },
)
