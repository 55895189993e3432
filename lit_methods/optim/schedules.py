"""Learning rate schedules that torch lacks."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class PiecewiseConstantLR(LambdaLR):
    """Each group's initial learning rate times a factor that changes at given steps, up or down.

    Args:
        optimizer: whose learning rates are set.
        factors: step of the schedule (usually an epoch, >= 0) -> factor (>= 0) from then on; before the first it is 1.

    Raises:
        ValueError: a negative step or factor.
    """

    def __init__(self, optimizer: Optimizer, factors: dict[int, float]) -> None:
        if not all(step >= 0 and 0 <= factor < float("inf") for step, factor in factors.items()):
            raise ValueError(f"factors must map steps >= 0 to factors >= 0 and finite, got {factors}")
        changes = sorted(factors.items())

        def factor_at(now: int) -> float:
            return next((factor for step, factor in reversed(changes) if step <= now), 1.0)

        super().__init__(optimizer, factor_at)
