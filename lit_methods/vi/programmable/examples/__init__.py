"""The models and guides of the recipes: examples to read, and to begin from."""

from lit_methods.vi.programmable.examples.air import SceneGuide, SceneModel
from lit_methods.vi.programmable.examples.coin import BetaGuide, CoinModel
from lit_methods.vi.programmable.examples.cone import ConeModel, NormalGuide, RingGuide
from lit_methods.vi.programmable.examples.regression import RegressionModel, WeightGuide
from lit_methods.vi.programmable.examples.vae import VAEGuide, VAEModel

__all__ = [
    "BetaGuide",
    "CoinModel",
    "ConeModel",
    "NormalGuide",
    "RegressionModel",
    "RingGuide",
    "SceneGuide",
    "SceneModel",
    "VAEGuide",
    "VAEModel",
    "WeightGuide",
]
