"""A toy preference that no score can express: words of class a beat b, b beat c and c beat a."""

import math
from functools import lru_cache

from lit_methods.batches import Prompt

SHARPNESS, JUNK_PENALTY = 4.0, 3.0


def word_game_preference(prompt: Prompt, first: str, second: str) -> float:
    """Probability that the first response is preferred, in ``(0, 1)``.

    With ``f`` the shares of words that begin with a, b and c, and ``junk`` the share of all others, its logit is
    ``4 f1 R f2 + 3 (junk2 - junk1)``, where ``R`` is rock-paper-scissors. An empty response is all junk.

    Args:
        prompt: not looked at.
        first: words separated by spaces.
        second: words separated by spaces.
    """
    a1, b1, c1, junk1 = _shares(first)
    a2, b2, c2, junk2 = _shares(second)
    cycle = a1 * (b2 - c2) + b1 * (c2 - a2) + c1 * (a2 - b2)
    return 1.0 / (1.0 + math.exp(-SHARPNESS * cycle - JUNK_PENALTY * (junk2 - junk1)))


@lru_cache(maxsize=4096)
def _shares(text: str) -> tuple[float, float, float, float]:
    words = text.split()
    if not words:
        return 0.0, 0.0, 0.0, 1.0
    counts = [sum(word[0] == letter for word in words) / len(words) for letter in "abc"]
    return counts[0], counts[1], counts[2], 1.0 - sum(counts)
