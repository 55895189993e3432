from .mdpo import OffPolicyMDPO as OffPolicyMDPO
from .mdpo import OnPolicyMDPO as OnPolicyMDPO
