"""Variational inference for SDEs driven by fractional noise (arXiv 2310.12975)."""

from lit_methods.fractional_noise import fbm_covariance, sample_fbm
from lit_methods.vi.fractional_sde.hurst import HurstFit, fit_hurst
from lit_methods.vi.fractional_sde.linear import linear_covariance
from lit_methods.vi.fractional_sde.markov_fbm import HurstCurve, MarkovFBM
from lit_methods.vi.fractional_sde.module import FractionalSDEModule
from lit_methods.vi.fractional_sde.networks import (
    ControlMLP,
    DiagonalDiffusion,
    DriftMLP,
    Encoding,
    LinearDrift,
    NoisePosterior,
    SeriesEncoder,
)
from lit_methods.vi.fractional_sde.sde import FractionalSDE, SDEPath
from lit_methods.vi.fractional_sde.video import VideoDecoder, VideoEncoder
from lit_methods.vi.fractional_sde.weights import ou_speeds

__all__ = [
    "ControlMLP",
    "DiagonalDiffusion",
    "DriftMLP",
    "Encoding",
    "FractionalSDE",
    "FractionalSDEModule",
    "HurstCurve",
    "HurstFit",
    "LinearDrift",
    "MarkovFBM",
    "NoisePosterior",
    "SDEPath",
    "SeriesEncoder",
    "VideoDecoder",
    "VideoEncoder",
    "fbm_covariance",
    "fit_hurst",
    "linear_covariance",
    "ou_speeds",
    "sample_fbm",
]
