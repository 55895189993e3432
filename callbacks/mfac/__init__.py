"""Callbacks for M-FAC: pruning and the spectrum of the empirical Fisher matrix."""

from lit_methods.callbacks.mfac.empirical_fisher_monitor import EmpiricalFisherMonitor
from lit_methods.callbacks.mfac.pruning import MFACPruning
from lit_methods.callbacks.mfac.pruning_curve import PruningCurve

__all__ = ["EmpiricalFisherMonitor", "MFACPruning", "PruningCurve"]
