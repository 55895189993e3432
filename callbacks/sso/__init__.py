"""Callbacks for target-based surrogates."""

from lit_methods.callbacks.sso.capture_targets import TargetCapture
from lit_methods.callbacks.sso.surrogate_monitor import SurrogateMonitor

__all__ = ["SurrogateMonitor", "TargetCapture"]
