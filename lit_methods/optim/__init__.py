"""Optimizers for any torch model; nothing here imports lightning."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.optim.armijo_sgd import ArmijoSGD
    from lit_methods.optim.cbo import CBO, ConsensusHopping, particle_losses
    from lit_methods.optim.cbo_variants import AdamCBO, ConsensusBasedSampling, MemoryCBO, PolarizedCBO
    from lit_methods.optim.constraints import Ball, Box, L1Ball, Simplex
    from lit_methods.optim.extragradient import ExtraAdam, ExtraGradient
    from lit_methods.optim.fisher_inverse import FisherInverse, collect_gradients
    from lit_methods.optim.implicit_omd import ImplicitOMD
    from lit_methods.optim.mdpo import MDPO, MDPOStepSize
    from lit_methods.optim.mfac import MFAC
    from lit_methods.optim.mirror_maps import (
        DiagonalAdaGrad,
        Entropy,
        Euclidean,
        Hypentropy,
        PNorm,
        UnnormalizedEntropy,
    )
    from lit_methods.optim.optimistic_adam import OptimisticAdam
    from lit_methods.optim.optimistic_ensemble import OptimisticEnsemble
    from lit_methods.optim.optimistic_ftrl import OptimisticFTL, OptimisticFTRL
    from lit_methods.optim.optimistic_newton import OptimisticOnlineNewton
    from lit_methods.optim.optimistic_omd import OptimisticOMD
    from lit_methods.optim.scaled_gd import ScaledGD
    from lit_methods.optim.schedules import PiecewiseConstantLR
    from lit_methods.optim.sso import SSO

__all__ = [
    "CBO",
    "MDPO",
    "MFAC",
    "SSO",
    "AdamCBO",
    "ArmijoSGD",
    "Ball",
    "Box",
    "ConsensusBasedSampling",
    "ConsensusHopping",
    "DiagonalAdaGrad",
    "Entropy",
    "Euclidean",
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
    "ScaledGD",
    "Simplex",
    "UnnormalizedEntropy",
    "collect_gradients",
    "particle_losses",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "AdamCBO": "cbo_variants",
        "ArmijoSGD": "armijo_sgd",
        "Ball": "constraints",
        "Box": "constraints",
        "CBO": "cbo",
        "ConsensusBasedSampling": "cbo_variants",
        "ConsensusHopping": "cbo",
        "DiagonalAdaGrad": "mirror_maps",
        "Entropy": "mirror_maps",
        "Euclidean": "mirror_maps",
        "ExtraAdam": "extragradient",
        "ExtraGradient": "extragradient",
        "FisherInverse": "fisher_inverse",
        "Hypentropy": "mirror_maps",
        "ImplicitOMD": "implicit_omd",
        "L1Ball": "constraints",
        "MDPO": "mdpo",
        "MDPOStepSize": "mdpo",
        "MFAC": "mfac",
        "MemoryCBO": "cbo_variants",
        "OptimisticAdam": "optimistic_adam",
        "OptimisticEnsemble": "optimistic_ensemble",
        "OptimisticFTL": "optimistic_ftrl",
        "OptimisticFTRL": "optimistic_ftrl",
        "OptimisticOMD": "optimistic_omd",
        "OptimisticOnlineNewton": "optimistic_newton",
        "PNorm": "mirror_maps",
        "PiecewiseConstantLR": "schedules",
        "PolarizedCBO": "cbo_variants",
        "SSO": "sso",
        "ScaledGD": "scaled_gd",
        "Simplex": "constraints",
        "UnnormalizedEntropy": "mirror_maps",
        "collect_gradients": "fisher_inverse",
        "particle_losses": "cbo",
    },
)
