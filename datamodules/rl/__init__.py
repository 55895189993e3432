"""Environments, replay buffers and recorded trajectories."""

from lit_methods.datamodules.rl.d4rl import D4RLDataModule
from lit_methods.datamodules.rl.imitation import ImitationDataModule
from lit_methods.datamodules.rl.recordings import save_minari, save_transitions_hdf5
from lit_methods.datamodules.rl.replay import ReplayDataModule
from lit_methods.datamodules.rl.rollouts import RolloutDataModule

__all__ = [
    "D4RLDataModule",
    "ImitationDataModule",
    "ReplayDataModule",
    "RolloutDataModule",
    "save_minari",
    "save_transitions_hdf5",
]
