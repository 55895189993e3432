"""Small-gain Nash: certificates of contraction, and the games that they are for."""

from lit_methods.games.small_gain.bounds import certify, estimate_bounds
from lit_methods.games.small_gain.certificate import (
    GameBounds,
    SmallGainCertificate,
    optimal_weights,
    small_gain_margin,
    small_gain_matrix,
    timescale_band,
    weight_bands,
)
from lit_methods.games.small_gain.games import DifferentiableGame, NetworkGame, QuadraticGame, pseudo_gradient
from lit_methods.games.small_gain.markov import MarkovGame
from lit_methods.games.small_gain.module import GameModule

__all__ = [
    "DifferentiableGame",
    "GameBounds",
    "GameModule",
    "MarkovGame",
    "NetworkGame",
    "QuadraticGame",
    "SmallGainCertificate",
    "certify",
    "estimate_bounds",
    "optimal_weights",
    "pseudo_gradient",
    "small_gain_margin",
    "small_gain_matrix",
    "timescale_band",
    "weight_bands",
]
