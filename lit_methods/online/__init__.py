"""Online learning and imitation."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.online.learning import OnlineLearning, run_online

__all__ = ["OnlineLearning", "run_online"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "OnlineLearning": "learning",
        "run_online": "learning",
    },
)
