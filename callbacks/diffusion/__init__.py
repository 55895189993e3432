"""Callbacks for models that make samples."""

from lit_methods.callbacks.diffusion.consistency_schedule import ConsistencySchedule
from lit_methods.callbacks.diffusion.likelihood import LikelihoodEvaluation
from lit_methods.callbacks.diffusion.restoration import RestorationGrid
from lit_methods.callbacks.diffusion.sample_grid import SampleGrid
from lit_methods.callbacks.diffusion.sample_quality import SampleQuality

__all__ = ["ConsistencySchedule", "LikelihoodEvaluation", "RestorationGrid", "SampleGrid", "SampleQuality"]
