"""Reinforcement learning."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.rl.mdpo import OffPolicyMDPO, OnPolicyMDPO

__all__ = ["OffPolicyMDPO", "OnPolicyMDPO"]

__getattr__, __dir__ = lazy_exports(__name__, {"OffPolicyMDPO": "mdpo", "OnPolicyMDPO": "mdpo"})
