"""Training and minimisation by loss values alone."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.black_box.cbo import CBOModule
    from lit_methods.black_box.landscapes import Ackley, GrandCanyon, Rastrigin
    from lit_methods.black_box.minimization import LandscapeMinimization

__all__ = ["Ackley", "CBOModule", "GrandCanyon", "LandscapeMinimization", "Rastrigin"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Ackley": "landscapes",
        "CBOModule": "cbo",
        "GrandCanyon": "landscapes",
        "LandscapeMinimization": "minimization",
        "Rastrigin": "landscapes",
    },
)
