from .cbo import CBOModule as CBOModule
from .landscapes import Ackley as Ackley
from .landscapes import GrandCanyon as GrandCanyon
from .landscapes import Rastrigin as Rastrigin
from .minimization import LandscapeMinimization as LandscapeMinimization
