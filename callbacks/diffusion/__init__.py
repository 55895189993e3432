"""Callbacks for models that make samples."""

from lit_methods.callbacks.diffusion.restoration import RestorationGrid
from lit_methods.callbacks.diffusion.sample_grid import SampleGrid
from lit_methods.callbacks.diffusion.sample_quality import SampleQuality

__all__ = ["RestorationGrid", "SampleGrid", "SampleQuality"]
