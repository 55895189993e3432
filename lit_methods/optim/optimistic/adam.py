"""Optimistic Adam, for GANs and other games.

Daskalakis, Ilyas, Syrgkanis, Zeng, "Training GANs with Optimism", ICLR 2018, arXiv 1711.00141, algorithm 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_methods.optim.foundation.flat import local_tensor
from lit_methods.optim.foundation.states import state_dtype
from lit_methods.optim.optimistic.base import OnlineOptimizer, loss_gradient

__all__ = ["OptimisticAdam"]


class OptimisticAdam(OnlineOptimizer):
    r"""Adam whose last direction is the guess of the next: :math:`\theta \leftarrow \theta - 2 lr\,u_t + lr\,u_{t-1}`.

    :math:`u_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon)` is Adam's direction, :math:`u_0 = 0`. Put all players of a
    game into one optimizer (``maximize`` in the groups of those who ascend) and step once on their joint gradient.

    State: 12 bytes a parameter. DTensor parameters are used shard by shard. ``lr = 0`` pauses a group. A step
    synchronises once with the host, to see whether the gradients are finite: if not, it changes nothing, and the first
    such step warns.

    Args:
        params: parameters, named parameters or groups.
        lr: step size, >= 0.
        betas: decay of the two moments, each in [0, 1); the paper's GANs have (0.5, 0.9).
        eps: > 0.
        weight_decay: L2 coefficient >= 0, part of the loss.
        maximize: ascend.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: in :meth:`step`, for sparse gradients.
    """

    state_names = (
        "rounds",
        "exp_avg",
        "exp_avg_sq",
        "last",
    )
    takes_dtensors = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_adam_group(group)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if "last" not in self.state[p]:
                self.state[p]["last"] = torch.zeros_like(p, dtype=state_dtype(p))
        if group["lr"] == 0:
            adam_directions(group, params, [self.state[p] for p in params])
            return
        # a CPU is faster tensor by tensor, which stays in its cache; CUDA with few kernels
        batches = [params] if local_tensor(params[0]).is_cuda else [[p] for p in params]
        for batch in batches:
            directions = adam_directions(group, batch, [self.state[p] for p in batch])
            points = [local_tensor(p) for p in batch]
            last = [local_tensor(self.state[p]["last"]) for p in batch]
            torch._foreach_add_(points, directions, alpha=-2 * group["lr"])
            torch._foreach_add_(points, last, alpha=group["lr"])
            torch._foreach_copy_(last, directions)


def check_adam_group(group: dict[str, Any]) -> None:
    """Validate Adam's hyperparameters."""
    if not all(0 <= beta < 1 for beta in group["betas"]) or len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
    if not 0 < group["eps"] < float("inf"):
        raise ValueError(f"eps must be > 0 and finite, got {group['eps']}")
    if not 0 <= group["weight_decay"] < float("inf"):
        raise ValueError(f"weight_decay must be >= 0 and finite, got {group['weight_decay']}")


def adam_directions(group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]]) -> list[Tensor]:
    """Update Adam's moments (nothing in a paused group) and return its directions, as local shards.

    Args:
        group: with ``lr``, ``betas``, ``eps``.
        params: with gradients.
        states: of the parameters; moments are made when missing.
    """
    for p, state in zip(params, states, strict=True):
        if "exp_avg" not in state:
            zeros = torch.zeros_like(p, dtype=state_dtype(p))
            state.update(rounds=0, exp_avg=zeros, exp_avg_sq=torch.zeros_like(zeros))
    if group["lr"] == 0:
        return []
    gradients = [loss_gradient(p, group) for p in params]
    first = [local_tensor(state["exp_avg"]) for state in states]
    second = [local_tensor(state["exp_avg_sq"]) for state in states]
    beta1, beta2 = group["betas"]
    for state in states:
        state["rounds"] += 1
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    roots = torch._foreach_sqrt(second)
    torch._foreach_div_(roots, [(1 - beta2 ** state["rounds"]) ** 0.5 for state in states])
    torch._foreach_add_(roots, group["eps"])
    torch._foreach_mul_(roots, [1 - beta1 ** state["rounds"] for state in states])
    torch._foreach_reciprocal_(roots)
    torch._foreach_mul_(roots, first)
    return list(roots)
