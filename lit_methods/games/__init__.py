"""Games: equilibria of preference games, matrix games and a small GAN for game optimizers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
