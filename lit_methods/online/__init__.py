"""Online learning and imitation."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.online.imitation import OnlineImitation

__all__ = ["OnlineImitation"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "OnlineImitation": "imitation",
    },
)
