"""Callbacks for reinforcement learning."""

from lit_methods.callbacks.rl.policy_evaluation import PolicyEvaluation
from lit_methods.callbacks.rl.policy_frames import PolicyFrames

__all__ = ["PolicyEvaluation", "PolicyFrames"]
