"""Closures that an optimizer calls more than once in a step."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class RepeatedClosure:
    """Calls a closure several times in one step, each time for the gradient of the same loss alone.

    Gradients that were accumulated before the step belong to other mini-batches, which a second call cannot evaluate
    again: the step would mix two losses, so it is refused.

    Args:
        optimizer: who calls. Its ``zero_grad`` must set ``gradients_cleared``.
        closure: evaluates the loss, calls ``backward``, and returns the loss.
    """

    def __init__(self, optimizer: Optimizer, closure: Callable[[], Any]) -> None:
        self._optimizer, self._closure, self._called = optimizer, closure, False

    def __call__(self) -> Any:
        """The loss, with its gradients in ``.grad``.

        Raises:
            RuntimeError: gradients of earlier mini-batches are still there.
        """
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        before = {} if self._called else {p: (p.grad, p.grad._version) for p in params if p.grad is not None}
        if self._called:
            for p in params:
                p.grad = None
        self._optimizer.gradients_cleared = False  # type: ignore[attr-defined]
        with torch.enable_grad():
            loss = self._closure()
        added = any(p.grad is grad and grad._version != version for p, (grad, version) in before.items())
        if added and loss is not None and not self._optimizer.gradients_cleared:  # type: ignore[attr-defined]
            name = type(self._optimizer).__name__
            raise RuntimeError(
                f"{name} evaluates the loss of a step more than once, which accumulated gradients do not allow: set "
                "accumulate_grad_batches=1 (and a larger batch), or clear the gradients in the closure by "
                "optimizer.zero_grad()"
            )
        self._called = True
        return loss
