"""Optimistic online learning: mirror descent, follow the leader, Newton, extragradient (arXiv 2302.04552)."""

from lit_methods.optim.optimistic.adam import OptimisticAdam
from lit_methods.optim.optimistic.ensemble import OptimisticEnsemble
from lit_methods.optim.optimistic.extragradient import ExtraAdam, ExtraGradient
from lit_methods.optim.optimistic.ftrl import OptimisticFTL, OptimisticFTRL
from lit_methods.optim.optimistic.implicit import ImplicitOMD
from lit_methods.optim.optimistic.newton import OptimisticOnlineNewton
from lit_methods.optim.optimistic.omd import OptimisticOMD

__all__ = [
    "ExtraAdam",
    "ExtraGradient",
    "ImplicitOMD",
    "OptimisticAdam",
    "OptimisticEnsemble",
    "OptimisticFTL",
    "OptimisticFTRL",
    "OptimisticOMD",
    "OptimisticOnlineNewton",
]
