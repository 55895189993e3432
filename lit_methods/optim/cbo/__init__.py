"""Consensus-based optimization and its kin: optimizers that use loss values only (arXiv 2306.09778)."""

from lit_methods.optim.cbo.adam import AdamCBO
from lit_methods.optim.cbo.cbo import CBO
from lit_methods.optim.cbo.closures import particle_losses
from lit_methods.optim.cbo.hopping import ConsensusHopping
from lit_methods.optim.cbo.memory import MemoryCBO
from lit_methods.optim.cbo.polarized import PolarizedCBO
from lit_methods.optim.cbo.sampling import ConsensusBasedSampling
from lit_methods.optim.cbo.settings import EffectiveSampleSize, Growing, InitialCloud, ParticleBatches

__all__ = [
    "CBO",
    "AdamCBO",
    "ConsensusBasedSampling",
    "ConsensusHopping",
    "EffectiveSampleSize",
    "Growing",
    "InitialCloud",
    "MemoryCBO",
    "ParticleBatches",
    "PolarizedCBO",
    "particle_losses",
]
