"""Callbacks for optimal transport."""

from lit_methods.callbacks.transport.transport_table import TransportTable

__all__ = ["TransportTable"]
