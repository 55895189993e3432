r"""Optimistic online Newton step, for exp-concave losses.

Chen, Tu, Zhao, Zhang, JMLR 25(178), 2024 (arXiv 2302.04552): optimistic online mirror descent with
:math:`\psi_t = \|x\|^2_{H_t} / 2`, :math:`H_t = \epsilon I + (\beta/2) \sum_{s<t} g_s g_s^\top`, and regret
:math:`O((d/\alpha) \log(\sigma^2_{1:T} + \Sigma^2_{1:T}))`.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_methods.optim.constraints import Ball, weighted_ball_multiplier
from lit_methods.optim.foundation.groups import check_positive
from lit_methods.optim.optimistic.base import Hint, OnlineOptimizer, check_optimism, loss_gradient, start_inside

__all__ = ["OptimisticOnlineNewton"]


class OptimisticOnlineNewton(OnlineOptimizer):
    r"""Online Newton step with the last gradient as a guess of the next one.

    All parameters of a group are one vector x of d coordinates:

    1. :math:`\hat x_{t+1} = \Pi^{H_t}[\hat x_t - lr\,H_t^{-1} g_t]`;
    2. :math:`H_{t+1} = H_t + (\beta/2)\,g_t g_t^\top`;
    3. :math:`x_{t+1} = \Pi^{H_{t+1}}[\hat x_{t+1} - lr\,H_{t+1}^{-1} M_{t+1}]` is played.

    The step and its constants are recalled from the paper, not read in it (its bound was); the theory's :math:`\beta`
    (:meth:`theory_defaults`) is far too cautious in practice, so both constants are arguments.

    State: 2 d^2 + d float64 numbers. Time: O(d^2) a step by Sherman and Morrison's formula, and a fresh inverse every d
    steps. Host synchronisations on CUDA: one, to see whether the gradients are finite (if not, the step changes
    nothing, and the first such step warns); with ``radius`` one more a projection, and an eigendecomposition, O(d^3),
    where the ball is active. A parameter without a gradient stays where it is and counts as one with gradient 0; the
    others move in what it leaves of the ball. A start outside of the ball is projected, with a warning.

    Args:
        params: parameters, named parameters or groups.
        lr: factor of both steps, >= 0; 1 in the paper.
        beta: :math:`\beta` > 0.
        epsilon: :math:`\epsilon` > 0, the scale of the first matrix.
        radius: play inside the L2 ball around the origin of this radius, > 0; None for no constraint.
        optimism: "last_gradient", "none" (the online Newton step), or a function that is given a parameter and returns
            its guess of the next gradient.
        weight_decay: L2 coefficient >= 0, part of the loss.
        max_dim: refuse groups of more coordinates.
        maximize: ascend.

    Raises:
        ValueError: a hyperparameter out of range, more than ``max_dim`` coordinates, or DTensor parameters.
        RuntimeError: in :meth:`step`, for sparse gradients.
    """

    state_names = (
        "rounds",
        "x_hat",
        "matrix",
        "inverse",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        beta: float = 1.0,
        epsilon: float = 1.0,
        radius: float | None = None,
        *,
        optimism: Literal["last_gradient", "none"] | Hint = "last_gradient",
        weight_decay: float = 0.0,
        max_dim: int = 4096,
        maximize: bool = False,
    ) -> None:
        check_optimism(optimism)
        if max_dim < 1:
            raise ValueError(f"max_dim must be >= 1, got {max_dim}")
        self._optimism = optimism
        self._max_dim = max_dim
        super().__init__(
            params,
            {
                "lr": lr,
                "beta": beta,
                "epsilon": epsilon,
                "radius": radius,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
        )

    @staticmethod
    def theory_defaults(grad_bound: float, diameter: float, exp_concavity: float) -> dict[str, float]:
        """``beta`` and ``epsilon`` of the analysis for gradients of norm G, a set of diameter D, alpha-exp-concavity.

        beta = min(1 / (4 G D), alpha) / 2 and epsilon = 1 + beta G^2 / 2 (recalled, unverified).
        """
        check_positive(grad_bound=grad_bound, diameter=diameter, exp_concavity=exp_concavity)
        beta = 0.5 * min(1 / (4 * grad_bound * diameter), exp_concavity)
        return {"beta": beta, "epsilon": 1 + 0.5 * beta * grad_bound**2}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_optimism": self._optimism, "_max_dim": self._max_dim}

    def _check_group(self, group: dict[str, Any]) -> None:
        check_positive(beta=group["beta"], epsilon=group["epsilon"], radius=group["radius"])
        if not 0 <= group["weight_decay"] < float("inf"):
            raise ValueError(f"weight_decay must be >= 0 and finite, got {group['weight_decay']}")
        dim = sum(p.numel() for p in group["params"])
        if dim > self._max_dim:
            raise ValueError(
                f"max_dim={self._max_dim} is less than the {dim} coordinates of a group, whose matrices would take "
                f"{16 * dim**2 / 2**20:.0f} MiB; raise it, or use OptimisticOMD(mirror='adagrad', step_size='constant')"
            )
        if group["radius"] is not None and not any(p.is_meta for p in group["params"]):
            with torch.no_grad():
                start_inside(group["params"], Ball(group["radius"])([p.double() for p in group["params"]]))

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        state = self.state[group["params"][0]]
        if not state:
            flat = _flatten(group["params"])
            eye = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
            state.update(x_hat=flat.clone(), matrix=eye * group["epsilon"], inverse=eye / group["epsilon"])
        if group["lr"] == 0:
            return
        state["rounds"] = state.get("rounds", 0) + 1
        present = [p.grad is not None for p in group["params"]]
        g = _flatten(
            [
                loss_gradient(p, group) if has else torch.zeros_like(p)
                for p, has in zip(group["params"], present, strict=True)
            ]
        )
        x_hat, matrix, inverse = state["x_hat"], state["matrix"], state["inverse"]
        x_hat.copy_(project_what_moves(x_hat - group["lr"] * (inverse @ g), matrix, group))
        add_rank_one_(matrix, inverse, g, 0.5 * group["beta"], refactor=state["rounds"] % len(g) == 0)
        played = x_hat
        if self._optimism != "none":
            guess = g
            if callable(self._optimism):
                hints = [
                    loss_gradient(p, group, self._optimism(p)) if has else torch.zeros_like(p)
                    for p, has in zip(group["params"], present, strict=True)
                ]
                guess = _flatten(hints)
            played = project_what_moves(x_hat - group["lr"] * (inverse @ guess), matrix, group)
        parts = played.split([p.numel() for p in group["params"]])
        for p, part, has in zip(group["params"], parts, present, strict=True):
            if has:
                p.copy_(part.view_as(p))


def project_matrix_ball(y: Tensor, matrix: Tensor, radius: float | Tensor) -> Tensor:
    """Projection of ``y`` (d,) onto ``||x||_2 <= radius`` in the norm of ``matrix`` (d, d), symmetric and positive."""
    weights, basis = torch.linalg.eigh(matrix)
    z = basis.T @ y
    nu = weighted_ball_multiplier(weights, z, radius)
    return basis @ (weights * z / (weights + nu))


def project_onto_ball(y: Tensor, matrix: Tensor, radius: float | Tensor | None) -> Tensor:
    """``y`` where it is inside, or there is no ball, else :func:`project_matrix_ball`. Synchronises."""
    if radius is None or bool(y.norm() <= radius):
        return y
    return project_matrix_ball(y, matrix, radius)


def project_what_moves(y: Tensor, matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """``y`` with the coordinates that have a gradient projected onto what the parameters without leave of the ball."""
    fixed = [p.detach() for p in group["params"] if p.grad is None]
    if not fixed or group["radius"] is None:
        return project_onto_ball(y, matrix, group["radius"])
    moves = torch.cat([torch.full((p.numel(),), p.grad is not None) for p in group["params"]]).to(y.device)
    radius = Ball(group["radius"]).beside(fixed).radius
    return y.masked_scatter(moves, project_onto_ball(y[moves], matrix[moves][:, moves], radius))


def add_rank_one_(matrix: Tensor, inverse: Tensor, g: Tensor, scale: float, refactor: bool = False) -> None:
    """``matrix += scale g g^T``, and its inverse with it by Sherman and Morrison's formula, or anew."""
    matrix.addr_(g, g, alpha=scale)
    if refactor:
        inverse.copy_(torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix).L))
    else:
        h = inverse @ g
        inverse.sub_(torch.outer(h, h) * (scale / (1 + scale * (g @ h))))


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten().to(tensors[0].device, torch.float64) for x in tensors])
