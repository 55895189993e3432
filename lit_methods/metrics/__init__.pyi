from .ranking import NDCGAtK as NDCGAtK
from .ranking import RecallAtK as RecallAtK
from .ranking import top_unseen_items as top_unseen_items
from .regret import DynamicRegret as DynamicRegret
from .regret import GradientVariation as GradientVariation
from .regret import PathLength as PathLength
from .regret import StaticRegret as StaticRegret
