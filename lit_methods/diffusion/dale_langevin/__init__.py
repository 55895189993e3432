"""Dale meets Langevin: multiplicative denoising diffusion of positive data (arXiv 2510.02730)."""

from lit_methods.diffusion.dale_langevin.losses import nonneg_score_matching_loss
from lit_methods.diffusion.dale_langevin.module import MultiplicativeDiffusion, PositiveData
from lit_methods.diffusion.dale_langevin.network import LogNetwork
from lit_methods.diffusion.dale_langevin.process import GeometricBrownian, NoiseVariance, PowerTimes
from lit_methods.diffusion.dale_langevin.samplers import DLS, UMS, Annealing

__all__ = [
    "DLS",
    "UMS",
    "Annealing",
    "GeometricBrownian",
    "LogNetwork",
    "MultiplicativeDiffusion",
    "NoiseVariance",
    "PositiveData",
    "PowerTimes",
    "nonneg_score_matching_loss",
]
