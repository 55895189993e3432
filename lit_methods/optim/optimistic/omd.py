r"""Optimistic online mirror descent, self-tuned by the variation of the gradients.

Chen, Tu, Zhao, Zhang, "Optimistic Online Mirror Descent for Bridging Stochastic and Adversarial Online Convex
Optimization", ICML 2023, and with Zhang in JMLR 25(178), 2024; arXiv 2302.04552. Round t plays :math:`x_t`, sees
:math:`g_t = \nabla f_t(x_t)`, guesses the next gradient :math:`M_{t+1}` (the last one, unless told otherwise), and sets

.. math::
    \hat x_{t+1} &= \arg\min_{x \in X} \langle g_t, x\rangle + B(x, \hat x_t) / \eta_t \\
    x_{t+1} &= \arg\min_{x \in X} \langle M_{t+1}, x\rangle + B(x, \hat x_{t+1}) / \eta_{t+1}

The order matters: :math:`\eta_t` has not seen :math:`g_t`, :math:`\eta_{t+1}` has. The regret is then small where
gradients vary little (independent data of small variance, slow drift) and never worse than in the adversarial case.
With a constant step and no constraint it is the optimistic (past extra-) gradient method of games and GANs, with one
gradient a step.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_methods.optim.constraints import Ball, Constraint, L1Ball, Simplex, apply_constraint
from lit_methods.optim.foundation.flat import is_dtensor, local_tensor, sum_over_shards
from lit_methods.optim.foundation.groups import check_positive, count_round, rounds_so_far
from lit_methods.optim.foundation.states import state_dtype
from lit_methods.optim.mirror_maps import (
    SMALLEST_PROBABILITY,
    DiagonalAdaGrad,
    Entropy,
    Euclidean,
    MirrorMap,
    MirrorName,
    PNorm,
    check_exact,
    mirror_map,
)
from lit_methods.optim.optimistic.base import (
    Hint,
    OnlineOptimizer,
    check_optimism,
    left_out,
    loss_gradient,
    start_inside,
)

__all__ = ["OptimisticOMD"]

_STEP_SIZES = ("constant", "adaptive", "strongly_convex")


class OptimisticOMD(OnlineOptimizer):
    r"""Optimistic online mirror descent over any parameters.

    Parameters hold the *played* point :math:`x_t`: evaluate them as they are. Step sizes:

    - ``"adaptive"`` (convex, smooth losses): :math:`\eta_t = lr / \sqrt{\delta + 4 G^2 + \bar V_{t-1}}` with
      :math:`\bar V_{t-1} = \sum_{s<t} \|g_s - M_s\|^2`; ``lr`` is the diameter D of the set. The paper's expected
      regret is :math:`O(\sqrt{\sigma^2_{1:T}} + \sqrt{\Sigma^2_{1:T}})`.
    - ``"strongly_convex"``: :math:`\eta_t = 2\,lr / (\lambda t)`. (The step is recalled from the paper, not read in
      it.)
    - ``"constant"``: :math:`\eta_t = lr`, e.g. for games.

    Euclidean without a constraint runs as :math:`x_{t+1} = x_t - \eta_t (g_t - M_t) - \eta_{t+1} M_{t+1}`, that is
    ``x - 2 lr g_t + lr g_{t-1}`` for a constant step: state 4 bytes a float32 parameter (none with
    ``optimism="none"``). Everything else, and parameters in half precision, keeps :math:`\hat x` in float32 besides: 8
    bytes.

    A step synchronises once with the host, to see whether the gradients are finite: if not, it changes nothing, and
    the first such step warns. A change of ``lr`` acts from the next played point on; ``lr = 0`` pauses a group.
    Parameters without a gradient stay where they are, and the others move in what these leave of a set that all share.
    A start outside the set is projected, with a warning. Clip before the step; the guess is then the clipped gradient.

    DDP: ranks hold identical state. DTensors (FSDP2, tensor parallelism) are taken with norms over all shards; maps and
    constraints that would split what belongs together (``p_norm``, and rows of ``entropy``, ``Simplex`` and ``L1Ball``
    cut by a shard, and user projections) are refused.

    Args:
        params: parameters, named parameters or groups. Groups may differ in ``lr``, ``delta``, ``grad_bound``,
            ``strong_convexity``, ``weight_decay``, ``maximize``.
        lr: the diameter D, the step, or a factor, >= 0; see above.
        step_size: "adaptive", "constant" or "strongly_convex".
        mirror: a map of :mod:`lit_methods.optim.mirror_maps` or its name. "adagrad" adapts by itself and needs
            ``step_size="constant"``.
        constraint: a set of :mod:`lit_methods.optim.constraints`, or your own Bregman projection of one tensor (the
            orthogonal projection, for the Euclidean map). ``entropy`` implies the simplex.
        optimism: "last_gradient", "none" (plain online mirror descent), or a function that is given a parameter (whose
            ``grad`` is the present gradient) and returns its guess of the next gradient. A function is not saved.
        delta: :math:`\delta` >= 0 under the root; the analysis has 10 D^2 L^2 (recalled, unverified).
        grad_bound: G, a bound on gradient norms, > 0; None takes the largest norm so far (practical, not in the paper).
        strong_convexity: :math:`\lambda` > 0, needed by "strongly_convex".
        weight_decay: L2 coefficient >= 0, part of the loss.
        per_parameter: every parameter tunes its own step; otherwise all of a group share one, as in the paper. Not
            with a ``Ball`` that all parameters share, in which one step moves all.
        average: also keep the average of the played points, for :meth:`averaged_parameters`.
        maximize: ascend; in one group of two, the other player of a game.
        foreach: use multi-tensor kernels where there is no constraint; None means on CUDA only (a CPU is faster
            tensor by tensor, which stays in its cache).

    Raises:
        ValueError: a hyperparameter out of range, or options that exclude one another.
        RuntimeError: in :meth:`step`, for sparse gradients.
    """

    state_names = (
        "rounds",
        "variation",
        "max_square",
        "step_size",
        "average",
        "squares",
        "x_hat",
        "guess",
    )
    takes_dtensors = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        step_size: Literal["constant", "adaptive", "strongly_convex"] = "adaptive",
        mirror: MirrorName | MirrorMap = "euclidean",
        constraint: Constraint | Callable[[Tensor], Tensor] | None = None,
        optimism: Literal["last_gradient", "none"] | Hint = "last_gradient",
        delta: float = 0.0,
        grad_bound: float | None = None,
        strong_convexity: float | None = None,
        weight_decay: float = 0.0,
        per_parameter: bool = False,
        average: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        if step_size not in _STEP_SIZES:
            raise ValueError(f"step_size must be one of {', '.join(_STEP_SIZES)}, got {step_size!r}")
        check_optimism(optimism)
        self._mirror = mirror_map(mirror)
        if isinstance(self._mirror, DiagonalAdaGrad) and step_size != "constant":
            raise ValueError(
                f"step_size={step_size!r} must be 'constant' with mirror='adagrad', which adapts by itself"
            )
        if isinstance(constraint, Constraint):
            check_exact(self._mirror, constraint)
        if per_parameter and isinstance(constraint, Ball) and not constraint.per_tensor:
            raise ValueError("constraint must be a Ball with per_tensor=True for per_parameter=True, got False")
        self._constraint = constraint
        self._optimism = optimism
        self._step_size = step_size
        self._per_parameter = per_parameter
        self._average = average
        super().__init__(
            params,
            {
                "lr": lr,
                "delta": delta,
                "grad_bound": grad_bound,
                "strong_convexity": strong_convexity,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
                "played_step": None,
            },
        )

    def __getstate__(self) -> dict[str, Any]:
        names = ("_mirror", "_constraint", "_optimism", "_step_size", "_per_parameter", "_average")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def averaged_parameters(self) -> list[Tensor]:
        """The average of the points played so far, for each parameter in the order of the groups.

        Raises:
            RuntimeError: the optimizer was built without ``average=True``.
        """
        if not self._average:
            raise RuntimeError("averaged_parameters() needs OptimisticOMD(..., average=True)")
        params = [p for group in self.param_groups for p in group["params"]]
        return [self.state[p].get("average", p.detach()) if p in self.state else p.detach() for p in params]

    def _check_group(self, group: dict[str, Any]) -> None:
        check_positive(grad_bound=group["grad_bound"], strong_convexity=group["strong_convexity"])
        for name in ("delta", "weight_decay"):
            if not 0 <= group[name] < float("inf"):
                raise ValueError(f"{name} must be >= 0 and finite, got {group[name]}")
        if self._step_size == "strongly_convex" and group["strong_convexity"] is None:
            raise ValueError("step_size='strongly_convex' needs strong_convexity, got strong_convexity=None")
        self._check_shards(group["params"])
        self._make_feasible(group["params"])

    def _check_shards(self, params: Sequence[Any]) -> None:
        shards = [p for p in params if is_dtensor(p) and any(not s.is_replicate() for s in p.placements)]
        if not shards:
            return
        mirror, constraint = self._mirror, self._constraint
        own = constraint is not None and not isinstance(constraint, Constraint)
        if own or isinstance(mirror, PNorm):
            raise ValueError("mirror='p_norm' and user projections need whole tensors, but params are sharded DTensors")
        if isinstance(constraint, Ball) and isinstance(mirror, DiagonalAdaGrad):
            raise ValueError("a Ball with mirror='adagrad' needs whole tensors, but params are sharded DTensors")
        rows = mirror if isinstance(mirror, Entropy) else constraint
        if isinstance(rows, Entropy | Simplex | L1Ball):
            for p in shards:
                if any(s.is_shard() and s.dim == rows.dim % p.ndim for s in p.placements):
                    raise ValueError(f"{type(rows).__name__} rows along dim {rows.dim} are split over shards of params")

    @torch.no_grad()
    def _make_feasible(self, params: Sequence[Any]) -> None:
        """Start inside the set, and inside the domain of the mirror map."""
        points = [local_tensor(p) for p in params]
        if any(p.is_meta for p in points) or (self._constraint is None and not self._mirror.positive):
            return
        if self._mirror.positive and any(bool((p <= 0).any()) for p in points):
            warnings.warn(
                f"the initial point has entries <= 0, where {type(self._mirror).__name__} is not defined: they become "
                f"{SMALLEST_PROBABILITY:g}",
                stacklevel=5,
            )
        wide = [p.to(state_dtype(p)) for p in points]
        if self._mirror.positive:
            projected = [self._mirror.point(self._mirror.coordinates(p)) for p in wide]
            if not isinstance(self._mirror, Entropy):
                projected = self._project(projected, params)
        else:
            projected = self._project(wide, params)
        start_inside(params, projected)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = self._states(group, params)
        if group["lr"] == 0:
            return
        rounds = count_round(self.state, group, params)
        if self._average:
            for p in group["params"]:
                average = self.state[p].get("average") if p in self.state else None
                if average is not None:
                    local_tensor(average).lerp_(local_tensor(p).to(average.dtype), 1 / rounds)
        gradients = [loss_gradient(p, group) for p in params]
        if self._per_parameter and self._step_size == "adaptive":
            for p, state, g in zip(params, states, gradients, strict=True):
                self._play(group, [p], [state], [g])
        else:
            self._play(group, params, states, gradients)
        group["played_step"] = self._scheduled_step(group, rounds + 1)

    def _states(self, group: dict[str, Any], params: list[Tensor]) -> list[dict[str, Any]]:
        """State of each parameter, made when its first gradient comes; the group's numbers are one tensor for all."""
        shared = next((self.state[p] for p in group["params"] if self.state.get(p)), None)
        numbers = ("variation", "max_square", "step_size") if self._step_size == "adaptive" else ()
        states = []
        for p in params:
            state = self.state[p]
            if not state:
                self._init_state(p, state, self._keeps_x_hat(group))
            if numbers and not self._per_parameter:
                for name in numbers:
                    state[name] = state[name] if shared is None else shared[name]
                shared = state if shared is None else shared
            states.append(state)
        return states

    def _init_state(self, p: Any, state: dict[str, Any], keeps_x_hat: bool) -> None:
        dtype = state_dtype(p)
        if self._step_size == "adaptive":
            for name in ("variation", "max_square", "step_size"):
                state[name] = torch.zeros((), dtype=dtype, device=p.device)
        if self._average:
            state["average"] = p.detach().to(dtype, copy=True)
        if isinstance(self._mirror, DiagonalAdaGrad):
            state["squares"] = torch.zeros_like(p, dtype=dtype)
        if keeps_x_hat:
            state["x_hat"] = torch.zeros_like(p, dtype=dtype)
            local_tensor(state["x_hat"]).copy_(self._mirror.coordinates(local_tensor(p).to(dtype)))
        needs_error = self._step_size == "adaptive" or isinstance(self._mirror, DiagonalAdaGrad)
        if self._optimism != "none" and (needs_error or not keeps_x_hat):
            state["guess"] = torch.zeros_like(p, dtype=dtype)

    def _keeps_x_hat(self, group: dict[str, Any]) -> bool:
        """Whether the group's state holds x-hat (in mirror coordinates), which the difference form does without."""
        plain = isinstance(self._mirror, Euclidean) and self._constraint is None
        return not plain or any(p.dtype.itemsize < 4 for p in group["params"])

    def _scheduled_step(self, group: dict[str, Any], t: int) -> float:
        """Step of round t where it is a number: eta_t of the constant and of the strongly convex case."""
        if self._step_size == "strongly_convex":
            return 2 * group["lr"] / (group["strong_convexity"] * t)
        return group["lr"]

    def _play(
        self, group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]], gradients: list[Tensor]
    ) -> None:
        """One round of parameters that share a step size."""
        hints: list[Tensor] | None = gradients
        if self._optimism == "none":
            hints = None
        elif callable(self._optimism):
            hints = [loss_gradient(p, group, self._optimism(p)) for p in params]
        foreach = local_tensor(params[0]).is_cuda if group["foreach"] is None else group["foreach"]
        if self._keeps_x_hat(group):
            self._play_from_x_hat(group, params, states, gradients, hints, foreach)
        else:
            self._play_by_differences(group, params, states, gradients, hints, foreach)

    def _play_from_x_hat(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        states: list[dict[str, Any]],
        gradients: list[Tensor],
        hints: list[Tensor] | None,
        foreach: bool,
    ) -> None:
        """Both steps of the algorithm as it stands in the paper."""
        guesses = [local_tensor(state["guess"]) for state in states if "guess" in state]
        errors = [m - g for m, g in zip(guesses, gradients, strict=True)] if guesses else gradients
        eta, next_eta = self._steps(group, params, states[0], gradients, errors)
        mirror = self._mirror
        x_hats = [local_tensor(state["x_hat"]) for state in states]
        weights = next_weights = None
        if isinstance(mirror, DiagonalAdaGrad):
            squares = [local_tensor(state["squares"]) for state in states]
            weights = [mirror.metric(s, g) for s, g in zip(squares, gradients, strict=True)]
            for s, error in zip(squares, errors, strict=True):
                s.addcmul_(error, error)
            next_weights = [mirror.metric(s, g) for s, g in zip(squares, gradients, strict=True)]
        for x_hat, y in zip(x_hats, self._descend(x_hats, gradients, eta, group, params, weights), strict=True):
            x_hat.copy_(y)
        played = x_hats if hints is None else self._descend(x_hats, hints, next_eta, group, params, next_weights)
        for p, y in zip(params, played, strict=True):
            local_tensor(p).copy_(mirror.point(y))
        if guesses and hints is not None:
            _copy_(guesses, hints, foreach)

    def _play_by_differences(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        states: list[dict[str, Any]],
        gradients: list[Tensor],
        hints: list[Tensor] | None,
        foreach: bool,
    ) -> None:
        """The unconstrained Euclidean case, which needs no x-hat."""
        guesses = [local_tensor(state["guess"]) for state in states if "guess" in state]
        errors = gradients  # g - M up to its sign
        if guesses and self._step_size == "adaptive":
            _add_scaled_(guesses, gradients, -1.0, foreach)  # in place: both the variation and the update need M - g
            errors = guesses
        eta, next_eta = self._steps(group, params, states[0], gradients, errors)
        points = [local_tensor(p) for p in params]
        if hints is None:
            _add_scaled_(points, gradients, -eta, foreach)
        elif foreach:
            _move_by_differences(points, gradients, guesses, errors is guesses, hints, eta, next_eta, True)
        else:  # tensor by tensor, which stays in a processor's cache
            for x, g, m, h in zip(points, gradients, guesses, hints, strict=True):
                _move_by_differences([x], [g], [m], errors is guesses, [h], eta, next_eta, False)

    def _steps(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        numbers: dict[str, Any],
        gradients: list[Tensor],
        errors: list[Tensor],
    ) -> tuple[Any, Any]:
        """eta_t, which has not seen g_t, and eta_{t+1}, which has."""
        if self._step_size != "adaptive":
            rounds = rounds_so_far(self.state, group)
            step, following = (self._scheduled_step(group, rounds + i) for i in (0, 1))
            played = group["played_step"]
            return (step if played is None or self._optimism == "none" else played), following
        variation, largest, played = numbers["variation"], numbers["max_square"], numbers["step_size"]
        square = None
        if group["grad_bound"] is None:
            square = self._dual_square(gradients, params)
            bound = torch.where(largest > 0, largest, square)
        else:
            bound = torch.full_like(variation, group["grad_bound"] ** 2)
        eta = torch.where(played > 0, played, _adaptive_step(group, bound, variation))
        variation.add_(self._dual_square(errors, params))
        if square is not None:
            torch.maximum(largest, square, out=largest)
            bound = largest
        played.copy_(_adaptive_step(group, bound, variation))
        return eta, played

    def _dual_square(self, tensors: list[Tensor], params: list[Tensor]) -> Tensor:
        if isinstance(self._mirror, Euclidean):
            return sum_over_shards([norm.square() for norm in torch._foreach_norm(tensors)], params)
        return sum_over_shards([self._mirror.dual_square(x) for x in tensors], params)

    def _descend(
        self,
        x_hats: list[Tensor],
        gradients: list[Tensor],
        eta: Any,
        group: dict[str, Any],
        params: list[Tensor],
        weights: list[Tensor] | None,
    ) -> list[Tensor]:
        """The argmin of one step, in mirror coordinates."""
        mirror = self._mirror
        scaled = [(eta.to(g.device) if isinstance(eta, Tensor) else eta) * g for g in gradients]
        if weights is not None:
            scaled = [g / w for g, w in zip(scaled, weights, strict=True)]
        moved = [mirror.move(x, g) for x, g in zip(x_hats, scaled, strict=True)]
        if self._constraint is None or isinstance(mirror, Entropy):
            return moved
        points = self._project([mirror.point(y) for y in moved], params, weights, left_out(group, params))
        return [mirror.coordinates(x) for x in points]

    def _project(
        self,
        points: list[Tensor],
        params: Sequence[Any],
        weights: list[Tensor] | None = None,
        fixed: Sequence[Any] = (),
    ) -> list[Tensor]:
        ball = self._constraint
        if isinstance(ball, Ball) and any(is_dtensor(p) for p in params):
            members = [[i] for i in range(len(points))] if ball.per_tensor else [list(range(len(points)))]
            left = torch.as_tensor(ball.radius, dtype=torch.float64).square()
            if fixed and not ball.per_tensor:
                left = left - sum_over_shards([local_tensor(p).double().square().sum() for p in fixed], fixed)
            for group in members:
                square = sum_over_shards([points[i].double().square().sum() for i in group], [params[i] for i in group])
                scale = torch.where(square > left, (left.clamp(min=0) / square).sqrt(), 1.0)
                for i in group:
                    points[i] = points[i] * scale
            return points
        return apply_constraint(self._constraint, points, weights=weights, fixed=fixed)


def _adaptive_step(group: dict[str, Any], bound: Tensor, variation: Tensor) -> Tensor:
    """lr / sqrt(delta + 4 G^2 + V), and 0 as long as all of them are 0."""
    under = group["delta"] + 4 * bound + variation
    return torch.where(under > 0, group["lr"] * under.rsqrt(), 0.0)


def _move_by_differences(
    points: list[Tensor],
    gradients: list[Tensor],
    guesses: list[Tensor],
    guesses_hold_errors: bool,
    hints: list[Tensor],
    eta: Any,
    next_eta: Any,
    foreach: bool,
) -> None:
    """``x -= eta (g - M) + next_eta M'``, ``M = M'``; the guesses come as M, or as M - g."""
    if guesses_hold_errors:
        _add_scaled_(points, guesses, eta, foreach)
        _add_scaled_(points, hints, -next_eta, foreach)
    elif hints[0] is gradients[0]:
        _add_scaled_(points, gradients, -(eta + next_eta), foreach)
        _add_scaled_(points, guesses, eta, foreach)
    else:
        _add_scaled_(points, gradients, -eta, foreach)
        _add_scaled_(points, guesses, eta, foreach)
        _add_scaled_(points, hints, -next_eta, foreach)
    _copy_(guesses, hints, foreach)


def _add_scaled_(targets: list[Tensor], sources: list[Tensor], scale: float | Tensor, foreach: bool) -> None:
    """``target += scale * source``; a tensor as scale stays on the device."""
    if isinstance(scale, Tensor):
        if foreach and scale.is_cuda and all(t.device == scale.device for t in targets):
            torch._foreach_add_(targets, torch._foreach_mul(sources, scale))
        else:
            for target, source in zip(targets, sources, strict=True):
                target.addcmul_(source, scale.to(target.device))
    elif foreach:
        torch._foreach_add_(targets, sources, alpha=scale)
    else:
        for target, source in zip(targets, sources, strict=True):
            target.add_(source, alpha=scale)


def _copy_(targets: list[Tensor], sources: list[Tensor], foreach: bool) -> None:
    if foreach:
        torch._foreach_copy_(targets, sources)
    else:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
