"""f-distill: few-step generators whose samples match a diffusion teacher's by any f-divergence (arXiv 2502.15681)."""

from lit_methods.diffusion.f_distill.discriminator import FeatureDiscriminator, PointDiscriminator
from lit_methods.diffusion.f_distill.module import FDistill
from lit_methods.diffusion.f_distill.settings import Critics, DensityRatio
from lit_methods.diffusion.f_distill.weights import RatioNormalizer, divergence_weight, normalize_weight, vsd_loss

__all__ = [
    "Critics",
    "DensityRatio",
    "FDistill",
    "FeatureDiscriminator",
    "PointDiscriminator",
    "RatioNormalizer",
    "divergence_weight",
    "normalize_weight",
    "vsd_loss",
]
