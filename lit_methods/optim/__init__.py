"""Optimizers for any torch model; nothing here imports lightning."""

from lit_methods.optim.cbo import (
    CBO,
    AdamCBO,
    ConsensusBasedSampling,
    ConsensusHopping,
    MemoryCBO,
    PolarizedCBO,
    particle_losses,
)
from lit_methods.optim.constraints import Ball, Box, L1Ball, Simplex
from lit_methods.optim.exponentiated_gradient import (
    AdamWExponentiated,
    ExponentiatedGradient,
    SignConstrainedSGD,
    SplitBias,
    dale_init_,
    eg_param_groups,
    lognormal_,
)
from lit_methods.optim.langevin import AnnealedLangevin
from lit_methods.optim.mdpo import MDPO, MDPOStepSize
from lit_methods.optim.mfac import MFAC, FisherInverse, collect_gradients
from lit_methods.optim.mirror_maps import (
    DiagonalAdaGrad,
    Entropy,
    Euclidean,
    Hypentropy,
    PNorm,
    UnnormalizedEntropy,
)
from lit_methods.optim.optimistic import (
    ExtraAdam,
    ExtraGradient,
    ImplicitOMD,
    OptimisticAdam,
    OptimisticEnsemble,
    OptimisticFTL,
    OptimisticFTRL,
    OptimisticOMD,
    OptimisticOnlineNewton,
)
from lit_methods.optim.pseudo_gradient_rk4 import PseudoGradientRK4
from lit_methods.optim.scaled_gd import ScaledGD
from lit_methods.optim.schedules import PiecewiseConstantLR
from lit_methods.optim.sso import SSO, ArmijoSGD

__all__ = [
    "CBO",
    "MDPO",
    "MFAC",
    "SSO",
    "AdamCBO",
    "AdamWExponentiated",
    "AnnealedLangevin",
    "ArmijoSGD",
    "Ball",
    "Box",
    "ConsensusBasedSampling",
    "ConsensusHopping",
    "DiagonalAdaGrad",
    "Entropy",
    "Euclidean",
    "ExponentiatedGradient",
    "ExtraAdam",
    "ExtraGradient",
    "FisherInverse",
    "Hypentropy",
    "ImplicitOMD",
    "L1Ball",
    "MDPOStepSize",
    "MemoryCBO",
    "OptimisticAdam",
    "OptimisticEnsemble",
    "OptimisticFTL",
    "OptimisticFTRL",
    "OptimisticOMD",
    "OptimisticOnlineNewton",
    "PNorm",
    "PiecewiseConstantLR",
    "PolarizedCBO",
    "PseudoGradientRK4",
    "ScaledGD",
    "SignConstrainedSGD",
    "Simplex",
    "SplitBias",
    "UnnormalizedEntropy",
    "collect_gradients",
    "dale_init_",
    "eg_param_groups",
    "lognormal_",
    "particle_losses",
]
