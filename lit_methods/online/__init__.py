"""Online learning and imitation."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.online.imitation import OnlineImitation
    from lit_methods.online.learning import OnlineLearning, run_online

__all__ = ["OnlineImitation", "OnlineLearning", "run_online"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "OnlineImitation": "imitation",
        "OnlineLearning": "learning",
        "run_online": "learning",
    },
)
