"""Low-rank matrix sensing by gradient descent on factors."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.sensing.matrix_sensing import AsymmetricSensing, SymmetricSensing
    from lit_methods.sensing.rebalancing import rebalance_factors_

__all__ = ["AsymmetricSensing", "SymmetricSensing", "rebalance_factors_"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "AsymmetricSensing": "matrix_sensing",
        "SymmetricSensing": "matrix_sensing",
        "rebalance_factors_": "rebalancing",
    },
)
