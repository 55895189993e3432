"""M-FAC: natural-gradient-like steps from a window of past gradients (arXiv 2107.03356)."""

from lit_methods.optim.mfac.fisher_inverse import FisherInverse, collect_gradients
from lit_methods.optim.mfac.optimizer import MFAC

__all__ = ["MFAC", "FisherInverse", "collect_gradients"]
