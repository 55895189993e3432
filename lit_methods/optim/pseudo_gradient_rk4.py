"""Simultaneous gradient play by the classical Runge-Kutta method.

Its step in certified games: *Small-Gain Nash*, arXiv 2512.06791, and :mod:`lit_methods.games.small_gain`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lit_methods.optim.foundation.closures import RepeatedClosure
from lit_methods.optim.foundation.finite import gradients_are_finite, warn_of_skipped_step
from lit_methods.optim.foundation.groups import check_gradients, check_lr, check_own_state

__all__ = ["PseudoGradientRK4"]


class PseudoGradientRK4(Optimizer):
    r"""``x <- x - lr (k1 + 2 k2 + 2 k3 + k4) / 6`` along the flow ``x' = -F(x)``; four evaluations a step.

    Use it for games, with one parameter group for each player, where plain simultaneous gradients need too short a
    step: the flow is followed to fourth order. It keeps no state between steps; in a step four more copies of the
    parameters. Four host synchronisations, which look for gradients that are not finite: such a step is skipped, with
    one warning. Ranks take the same step from averaged gradients.

    Example:
        >>> import torch
        >>> x, y = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> optimizer = PseudoGradientRK4([{"params": [x]}, {"params": [y]}], lr=0.5)
        >>> optimizer.step(lambda: [(x * y + x * x).sum(), (-x * y + y * y).sum()])
        [...]

    Args:
        params: parameters or groups; one group for each player where the closure returns a list of losses.
        lr: step h, >= 0; groups may differ, and 0 pauses a player.
        maximize: ascend.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: in :meth:`step`: no closure, another number of losses than groups, sparse or accumulated
            gradients.
    """

    gradients_cleared = False

    def __init__(self, params: ParamsT, lr: float = 1e-2, *, maximize: bool = False) -> None:
        super().__init__(params, {"lr": lr, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a player."""
        check_lr(param_group.get("lr", self.defaults["lr"]))
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups that this optimizer saved."""
        check_own_state(self, state_dict, set())
        super().load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.gradients_cleared = True
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: returns the players' losses, one for each group, without calling ``backward``: each group then gets
                the gradient of its own loss alone. Or it calls ``backward`` and returns one loss, as for any optimizer.

        Returns:
            What the closure returned where the step began.
        """
        if closure is None:
            if not any(group["lr"] for group in self.param_groups):
                return None  # how distributed checkpointing asks for states, of which there are none
            raise RuntimeError(
                "PseudoGradientRK4 evaluates the losses four times, so that step needs a closure, which a GradScaler "
                "(16-mixed) does not pass: use bf16-mixed, or manual optimization"
            )
        evaluate = RepeatedClosure(self, closure)
        first = None
        origins: dict[Tensor, Tensor] = {}
        sums: dict[Tensor, Tensor] = {}
        for weight, ahead in ((1.0, 0.5), (2.0, 0.5), (2.0, 1.0), (1.0, None)):
            found = self._gradients(evaluate)
            first = found if first is None else first
            if not gradients_are_finite([p for group in self.param_groups if group["lr"] for p in group["params"]]):
                for p, origin in origins.items():
                    p.copy_(origin)
                warn_of_skipped_step(self)
                return first
            for group in self.param_groups:
                sign = 1.0 if group["maximize"] else -1.0
                for p in group["params"]:
                    if p.grad is None or group["lr"] == 0:
                        continue
                    origin = origins.setdefault(p, p.detach().clone())
                    sums[p] = sums[p].add_(p.grad, alpha=weight) if p in sums else weight * p.grad
                    if ahead is None:
                        p.copy_(origin.add_(sums[p], alpha=sign * group["lr"] / 6))
                    else:
                        p.copy_(torch.add(origin, p.grad, alpha=sign * ahead * group["lr"]))
        return first

    def _gradients(self, evaluate: RepeatedClosure) -> Any:
        """Leave the gradients in ``.grad``; returns the detached losses."""
        found = evaluate()
        if isinstance(found, Sequence) and not isinstance(found, Tensor):
            set_own_gradients(found, [group["params"] for group in self.param_groups])
            found = [loss.detach() for loss in found]
        for group in self.param_groups:
            check_gradients(group["params"], "PseudoGradientRK4")
        return found


def set_own_gradients(losses: Sequence[Tensor], players: Sequence[Sequence[Tensor]]) -> None:
    """Write into ``.grad`` of each player's parameters the gradient of its own loss alone.

    Args:
        losses: scalars, one for each player.
        players: the parameters of each.

    Raises:
        RuntimeError: another number of losses than players.
    """
    if len(losses) != len(players):
        raise RuntimeError(f"losses must be one for each parameter group, got {len(losses)} for {len(players)} groups")
    for i, (loss, params) in enumerate(zip(losses, players, strict=True)):
        wanted = [p for p in params if p.requires_grad]
        if not loss.requires_grad:
            continue  # a loss that nobody can change
        found = torch.autograd.grad(loss, wanted, retain_graph=i + 1 < len(losses), allow_unused=True)
        for p, gradient in zip(wanted, found, strict=True):
            p.grad = gradient
