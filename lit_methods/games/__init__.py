"""Games: equilibria of preference games, matrix games and a small GAN for game optimizers."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.games.matrix_game import MatrixGame
    from lit_methods.games.preference import (
        exploitability,
        nash_md,
        prox_step,
        regularized_nash,
        solve_preference_game,
    )
    from lit_methods.games.preference_module import PreferenceGame
    from lit_methods.games.ring_gan import RingGAN

__all__ = [
    "MatrixGame",
    "PreferenceGame",
    "RingGAN",
    "exploitability",
    "nash_md",
    "prox_step",
    "regularized_nash",
    "solve_preference_game",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "MatrixGame": "matrix_game",
        "PreferenceGame": "preference_module",
        "RingGAN": "ring_gan",
        "exploitability": "preference",
        "nash_md": "preference",
        "prox_step": "preference",
        "regularized_nash": "preference",
        "solve_preference_game": "preference",
    },
)
