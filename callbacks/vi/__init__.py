"""Callbacks of variational inference."""

from lit_methods.callbacks.vi.count_accuracy import CountAccuracy
from lit_methods.callbacks.vi.posterior_diagnostics import PosteriorDiagnostics
from lit_methods.callbacks.vi.prior_rollouts import PriorRollouts

__all__ = ["CountAccuracy", "PosteriorDiagnostics", "PriorRollouts"]
