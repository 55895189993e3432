"""What the optimistic online optimizers share: strict parameters and gradients, and state that keeps its precision."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lit_methods.optim.constraints import Constraint
from lit_methods.optim.foundation.finite import gradients_are_finite, warn_of_skipped_step
from lit_methods.optim.foundation.flat import is_dtensor, local_grad, local_tensor
from lit_methods.optim.foundation.groups import check_gradients, check_lr
from lit_methods.optim.foundation.states import load_unrounded_state, state_dtype
from lit_methods.optim.mirror_maps import Euclidean, check_exact

Hint = Callable[[Tensor], Tensor]


class OnlineOptimizer(Optimizer):
    """An optimizer that validates each group, and loads its state in the dtype in which it was saved.

    Subclasses define :meth:`_check_group` and :meth:`_step_group`.
    """

    takes_dtensors = False
    state_names: tuple[str, ...]  # what the state of a parameter may hold

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own values of the hyperparameters are validated like the constructor's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_lr(group["lr"])
            for p in group["params"]:
                if not p.is_floating_point():
                    raise ValueError(
                        f"params must be real floating point, got {p.dtype}; view complex parameters as real"
                    )
                if is_dtensor(p) and not self.takes_dtensors:
                    raise ValueError(
                        f"params of {type(self).__name__} must not be DTensors (FSDP2, tensor parallelism): it works "
                        "on whole tensors; use DDP, or OptimisticOMD or OptimisticAdam, which take them"
                    )
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one round: see the gradient at the played point, play the next point.

        A group whose ``lr`` is 0 is paused: nothing of it changes. Nor does anything when a gradient is not finite.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [(g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups]
        if self._accepts([p for group, params in active if group["lr"] for p in params]):
            for group, params in active:
                if params:
                    self._step_group(group, params)
        return loss

    def _accepts(self, params: Sequence[Any]) -> bool:
        """Whether the gradients, which must be dense, are finite; warns of the first that are not."""
        check_gradients(params, type(self).__name__)
        finite = gradients_are_finite(params)
        if not finite:
            warn_of_skipped_step(self)
        return finite

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; tensors are copied to their parameter's device and keep their dtype."""
        load_unrounded_state(self, state_dict, {*self.state_names})

    def _check_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError


def loss_gradient(p: Any, group: dict[str, Any], gradient: Tensor | None = None) -> Tensor:
    """The gradient of what the group minimises: negated by ``maximize``, plus ``weight_decay * p``; a local shard.

    Args:
        p: the parameter.
        group: its group.
        gradient: taken instead of ``p.grad``, e.g. a hint.
    """
    g = local_grad(p) if gradient is None else local_tensor(gradient)
    g = g.to(state_dtype(p))
    if group["maximize"]:
        g = -g
    if group.get("weight_decay"):
        g = g.add(local_tensor(p), alpha=group["weight_decay"])
    return g


def check_constraint(constraint: Any) -> None:
    """Refuse sets onto which the orthogonal projection is not known; a user's projection passes."""
    if isinstance(constraint, Constraint):
        check_exact(Euclidean(), constraint)


def start_inside(params: Sequence[Any], projected: Sequence[Tensor]) -> None:
    """Put the starting point where its projection is, with a warning if that is elsewhere."""
    points = [local_tensor(p) for p in params]
    if not all(
        torch.allclose(x, p.to(x.dtype), rtol=1e-2 if p.dtype.itemsize < 4 else 1e-5, atol=1e-6)
        for x, p in zip(projected, points, strict=True)
    ):
        warnings.warn("the initial point lies outside the constraint set and was projected", stacklevel=6)
    for p, x in zip(points, projected, strict=True):
        p.copy_(x)


def left_out(group: dict[str, Any], params: Sequence[Any]) -> list[Any]:
    """The group's other parameters, which stay where they are while ``params`` move."""
    moving = {id(p) for p in params}
    return [p.detach() for p in group["params"] if id(p) not in moving]


def check_optimism(optimism: Any) -> None:
    """Raise unless ``optimism`` is one of the names, or a function."""
    if optimism not in ("last_gradient", "none") and not callable(optimism):
        raise ValueError(f"optimism must be 'last_gradient', 'none' or a function of a parameter, got {optimism!r}")
