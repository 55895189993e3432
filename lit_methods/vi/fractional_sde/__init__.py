"""Variational inference for SDEs driven by fractional noise (arXiv 2310.12975)."""

from lit_methods.fractional_noise import fbm_covariance, sample_fbm
from lit_methods.vi.fractional_sde.hurst import HurstFit, fit_hurst
from lit_methods.vi.fractional_sde.markov_fbm import HurstCurve, MarkovFBM
from lit_methods.vi.fractional_sde.weights import ou_speeds

__all__ = [
    "HurstCurve",
    "HurstFit",
    "MarkovFBM",
    "fbm_covariance",
    "fit_hurst",
    "ou_speeds",
    "sample_fbm",
]
