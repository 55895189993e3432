"""Callbacks for consensus-based optimization."""

from lit_methods.callbacks.cbo.cooling import CBOCooling
from lit_methods.callbacks.cbo.landscape_paths import LandscapePaths

__all__ = ["CBOCooling", "LandscapePaths"]
