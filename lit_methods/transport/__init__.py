"""Entropic optimal transport: a solver, losses, layers and metrics."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.transport.generator import OTGenerator
    from lit_methods.transport.point_clouds import grid_points, point_cost
    from lit_methods.transport.registration import PointRegistration
    from lit_methods.transport.sinkhorn_newton_sparse import OTResult, SinkhornNewton, sinkhorn_newton
    from lit_methods.transport.wasserstein import (
        OTLoss,
        SinkhornAssignment,
        WassersteinDistance,
        wasserstein_distance,
    )

__all__ = [
    "OTGenerator",
    "OTLoss",
    "OTResult",
    "PointRegistration",
    "SinkhornAssignment",
    "SinkhornNewton",
    "WassersteinDistance",
    "grid_points",
    "point_cost",
    "sinkhorn_newton",
    "wasserstein_distance",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "OTGenerator": "generator",
        "OTLoss": "wasserstein",
        "OTResult": "sinkhorn_newton_sparse",
        "PointRegistration": "registration",
        "SinkhornAssignment": "wasserstein",
        "SinkhornNewton": "sinkhorn_newton_sparse",
        "WassersteinDistance": "wasserstein",
        "grid_points": "point_clouds",
        "point_cost": "point_clouds",
        "sinkhorn_newton": "sinkhorn_newton_sparse",
        "wasserstein_distance": "wasserstein",
    },
)
