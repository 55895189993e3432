"""Games: equilibria of preference games."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.games.preference import (
        exploitability,
        nash_md,
        prox_step,
        regularized_nash,
        solve_preference_game,
    )
    from lit_methods.games.preference_module import PreferenceGame

__all__ = ["PreferenceGame", "exploitability", "nash_md", "prox_step", "regularized_nash", "solve_preference_game"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "PreferenceGame": "preference_module",
        "exploitability": "preference",
        "nash_md": "preference",
        "prox_step": "preference",
        "regularized_nash": "preference",
        "solve_preference_game": "preference",
    },
)
