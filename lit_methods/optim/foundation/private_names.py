"""Names of torch that come without a promise, in one place: what a new torch moves is mended here.

``torch._foreach_*`` is documented in spite of its underscore, and used directly.
"""

from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["BatchNorm", "ConvNd", "tree_leaves", "tree_map"]
