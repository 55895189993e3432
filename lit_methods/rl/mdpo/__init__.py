"""Mirror descent policy optimisation, on-policy and off-policy.

Tomar, Shani, Efroni, Ghavamzadeh, "Mirror Descent Policy Optimization", ICLR 2022, arXiv 2005.09814. Both modules take
proximal policy steps with :class:`lit_methods.optim.MDPO`; any datamodule whose batches are
:class:`~lit_methods.batches.RolloutBatch` or :class:`~lit_methods.batches.TransitionBatch` feeds them. Where the
authors' code and their paper differ, the docstrings say which one this follows.
"""

from lit_methods.rl.mdpo.off_policy import OffPolicyMDPO
from lit_methods.rl.mdpo.on_policy import OnPolicyMDPO

__all__ = ["OffPolicyMDPO", "OnPolicyMDPO"]
