"""Callbacks of variational inference."""

from lit_methods.callbacks.vi.prior_rollouts import PriorRollouts

__all__ = ["PriorRollouts"]
