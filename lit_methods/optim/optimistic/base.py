"""What the optimistic online optimizers share: strict parameters and gradients, and state that keeps its precision."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lit_methods.optim.foundation.flat import is_dtensor, local_grad, local_tensor
from lit_methods.optim.foundation.groups import check_gradients
from lit_methods.optim.foundation.states import load_unrounded_state, state_dtype

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
            if not (isinstance(group["lr"], int | float) and 0 <= group["lr"] < float("inf")):
                raise ValueError(f"lr must be a number >= 0 and finite, got {group['lr']}")
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

        A group whose ``lr`` is 0 is paused: nothing of it changes.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                check_gradients(params, type(self).__name__)
                self._step_group(group, params)
        return loss

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


def sum_over_shards(values: Sequence[Tensor], params: Sequence[Any]) -> Tensor:
    """Sum of one number per local tensor, over all tensors and all shards of DTensors."""
    if not any(is_dtensor(p) for p in params):
        home = values[0].device
        return torch.stack([value.to(home) for value in values]).sum()
    from torch.distributed.tensor import DTensor, Partial, Replicate

    by_layout: dict[Any, list[Tensor]] = {}
    for value, p in zip(values, params, strict=True):
        layout = (p.device_mesh, tuple(placement.is_shard() for placement in p.placements)) if is_dtensor(p) else None
        by_layout.setdefault(layout, []).append(value)
    totals = []
    for layout, group in by_layout.items():
        total = torch.stack(group).sum()
        if layout is not None:
            mesh, sharded = layout
            placements = [Partial() if shard else Replicate() for shard in sharded]
            total = DTensor.from_local(total, mesh, placements).full_tensor()
        totals.append(total)
    return torch.stack(totals).sum()


def check_optimism(optimism: Any) -> None:
    """Raise unless ``optimism`` is one of the names, or a function."""
    if optimism not in ("last_gradient", "none") and not callable(optimism):
        raise ValueError(f"optimism must be 'last_gradient', 'none' or a function of a parameter, got {optimism!r}")
