"""Nash-MP and Nash Prox for language models."""

from lit_methods.llm.nash_mp.loss import nash_prox_loss
from lit_methods.llm.nash_mp.module import NashMP
from lit_methods.llm.nash_mp.players import MirrorProx, Prox, Reference

__all__ = ["MirrorProx", "NashMP", "Prox", "Reference", "nash_prox_loss"]
