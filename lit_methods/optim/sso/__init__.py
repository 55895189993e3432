"""Target-based surrogates for stochastic optimization (arXiv 2302.02607)."""

from lit_methods.optim.sso.armijo_sgd import ArmijoSGD
from lit_methods.optim.sso.optimizer import SSO

__all__ = ["SSO", "ArmijoSGD"]
