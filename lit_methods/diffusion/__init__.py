"""Diffusion, flow matching and flow maps: processes, predictions, weightings, solvers, guidance, and their modules."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
