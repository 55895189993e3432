"""Names of torch that come without a promise, in one place: what a new torch moves is mended here.

``torch._foreach_*`` is documented in spite of its underscore, and used directly.
"""

from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # noqa: F401
from torch.nn.modules.conv import _ConvNd as ConvNd  # noqa: F401
from torch.utils._pytree import tree_leaves, tree_map  # noqa: F401
