"""Consensus-based optimization and its kin: optimizers that use loss values only (arXiv 2306.09778)."""

from lit_methods.optim.cbo.cbo import CBO, ConsensusHopping, particle_losses
from lit_methods.optim.cbo.variants import AdamCBO, ConsensusBasedSampling, MemoryCBO, PolarizedCBO

__all__ = [
    "CBO",
    "AdamCBO",
    "ConsensusBasedSampling",
    "ConsensusHopping",
    "MemoryCBO",
    "PolarizedCBO",
    "particle_losses",
]
