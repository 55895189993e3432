"""Optimizers for any torch model; nothing here imports lightning."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.optim.armijo_sgd import ArmijoSGD
    from lit_methods.optim.fisher_inverse import FisherInverse, collect_gradients
    from lit_methods.optim.mdpo import MDPO, MDPOStepSize
    from lit_methods.optim.mfac import MFAC
    from lit_methods.optim.schedules import PiecewiseConstantLR
    from lit_methods.optim.sso import SSO

__all__ = [
    "MDPO",
    "MFAC",
    "SSO",
    "ArmijoSGD",
    "FisherInverse",
    "MDPOStepSize",
    "PiecewiseConstantLR",
    "collect_gradients",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "ArmijoSGD": "armijo_sgd",
        "FisherInverse": "fisher_inverse",
        "MDPO": "mdpo",
        "MDPOStepSize": "mdpo",
        "MFAC": "mfac",
        "PiecewiseConstantLR": "schedules",
        "SSO": "sso",
        "collect_gradients": "fisher_inverse",
    },
)
