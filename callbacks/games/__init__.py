"""Callbacks for games."""

from lit_methods.callbacks.games.small_gain_certification import SmallGainCertification

__all__ = ["SmallGainCertification"]
