"""Callbacks for matrix sensing."""

from lit_methods.callbacks.sensing.factor_rebalancing import FactorRebalancing

__all__ = ["FactorRebalancing"]
