"""Callbacks for variational inference."""

from lit_methods.callbacks.vi.count_accuracy import CountAccuracy
from lit_methods.callbacks.vi.posterior_diagnostics import PosteriorDiagnostics

__all__ = ["CountAccuracy", "PosteriorDiagnostics"]
