"""Target-based surrogates for stochastic optimization (arXiv 2302.02607).

:class:`SSO` takes a solver of its surrogate and a rule for its step size, both also by name.
"""

from lit_methods.optim.sso.armijo_sgd import ArmijoSGD
from lit_methods.optim.sso.optimizer import SSO
from lit_methods.optim.sso.rules import (
    AdaGrad,
    AdaGradPerExample,
    Armijo,
    Constant,
    Exponential,
    Newton,
    Sqrt,
    StepRule,
)
from lit_methods.optim.sso.solvers import (
    ArmijoDescent,
    ConjugateGradient,
    GaussNewton,
    InnerSolver,
    OptimizerSteps,
    StrongWolfeLBFGS,
)

__all__ = [
    "SSO",
    "AdaGrad",
    "AdaGradPerExample",
    "Armijo",
    "ArmijoDescent",
    "ArmijoSGD",
    "ConjugateGradient",
    "Constant",
    "Exponential",
    "GaussNewton",
    "InnerSolver",
    "Newton",
    "OptimizerSteps",
    "Sqrt",
    "StepRule",
    "StrongWolfeLBFGS",
]
