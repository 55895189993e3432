"""Callbacks for sign-preserving training."""

from lit_methods.callbacks.dale.dale_monitor import DaleMonitor

__all__ = ["DaleMonitor"]
