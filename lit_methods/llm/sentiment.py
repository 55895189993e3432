"""A judge's score from a lexicon: how positive a text sounds."""

from functools import cache
from typing import Any

from lit_methods.batches import Prompt


def vader_sentiment(prompt: Prompt, response: str) -> float:
    """VADER's compound sentiment of a response, in ``[-1, 1]``; for :class:`~lit_methods.llm.judges.ScoreJudge`.

    Args:
        prompt: not looked at.
        response: the text.
    """
    return float(_analyser().polarity_scores(response)["compound"])


@cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("vader_sentiment needs: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()
