"""MDPO: mirror-descent policy optimisation as an optimizer.

Tomar, Shani, Efroni, Ghavamzadeh, "Mirror Descent Policy Optimization", ICLR 2022, arXiv 2005.09814. Outer iteration k
maximises a linearised objective minus a Bregman divergence to the policy it started from,

    θ_{k+1} ≈ argmax_θ  E_{s, a ~ π_θ}[A_k(s, a)] - (1/t_k) E_s[B(π_θ(s), π_k(s))],

by a fixed number of ordinary Adam steps from θ_k. B is KL(π_θ || π_k), the new policy first, or the Tsallis divergence.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    kl_divergence,
)
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import ParamsT

from lit_methods.optim.foundation.closures import RepeatedClosure
from lit_methods.optim.foundation.finite import gradients_are_finite, warn_of_skipped_step
from lit_methods.optim.foundation.groups import check_nonnegative, check_own_state, check_positive
from lit_methods.optim.foundation.ranks import world_size

__all__ = ["MDPO", "MDPOStepSize"]

_SHARED = ("inner_steps", "step_size", "q", "anchor", "anchor_interval", "max_grad_norm")


@dataclass
class _Run:
    """What one call of ``step`` and the calls of ``proximity`` within it share."""

    anchors: list[tuple[Tensor, ...]] = field(default_factory=list)
    calls: int = 0  # of proximity, in this evaluation of the closure
    inner_step: int | None = None
    divergence: Tensor | None = None


class MDPO(Adam):
    r"""Adam that takes several proximal steps on one batch, for any torch policy.

    ``step(closure)`` calls the closure ``inner_steps`` times, each followed by gradient clipping and one Adam step. The
    closure adds :meth:`proximity` to its loss, the divergence of the policy from where this call of ``step`` found it::

        optimizer = MDPO(policy.parameters(), lr=3e-4, inner_steps=10, step_size=1.0)

        def closure():
            optimizer.zero_grad()
            pi = policy(observations)  # a torch Distribution, or logits over the last dimension
            ratio = (pi.log_prob(actions) - old_log_probs).exp()
            loss = -(ratio * advantages).mean() + optimizer.proximity(pi)
            loss.backward()
            return loss

        optimizer.step(closure)

    Two kinds of anchor. "outputs" keeps what the policy put out in the first of the inner steps: no second network and
    no extra forward pass, but all inner steps must see the same batch. "parameters" keeps a copy of the parameters,
    renewed every ``anchor_interval`` calls of ``step``, for mini-batches and off-policy training;
    :meth:`anchor_parameters` hands it to ``torch.func.functional_call``.

    At the anchor the divergence and its gradient are zero, so with ``inner_steps=1`` and "outputs" this is Adam on the
    bare objective. Adam's moments persist from one call of ``step`` to the next. With Lightning's automatic
    optimization ``training_step`` is the closure; "16-mixed" is refused, since its gradient scaler allows no closure.
    Two host synchronisations per inner step on CUDA, to see whether the loss and its gradient are finite: if not, this
    inner step and those after it are not taken, and the first such step warns.

    Args:
        params: parameters, named parameters or groups. Groups may differ in Adam's own options.
        lr: Adam's step size, >= 0. The paper's 3e-4 belongs to runs of 1e7 environment steps; for up to 1e6 steps
            1e-3 did better.
        betas: Adam's averaging coefficients, in [0, 1).
        eps: Adam's term in the denominator, >= 0.
        weight_decay: Adam's coupled L2 coefficient, >= 0.
        inner_steps: m, Adam steps per call of ``step``, >= 1.
        step_size: t_k, > 0; the larger, the weaker the proximity. :class:`MDPOStepSize` anneals it.
        q: entropic index of the divergence, in [1, 2]: 1 is KL, 2 the squared Euclidean distance of probabilities.
            Above 1 for categorical and Bernoulli policies only, whose divergence is a finite sum.
        anchor: "outputs" or "parameters".
        anchor_interval: with "parameters", calls of ``step`` between copies, >= 1; None means 1.
        max_grad_norm: norm that the gradient of all groups is clipped to before each Adam step, > 0; None: no clipping.
        maximize: ascend instead of descend.
        foreach: see :class:`torch.optim.Adam`.
        fused: see :class:`torch.optim.Adam`.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: in ``step``, without a closure.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        inner_steps: int = 10,
        step_size: float = 1.0,
        q: float = 1.0,
        anchor: Literal["outputs", "parameters"] = "outputs",
        anchor_interval: int | None = None,
        max_grad_norm: float | None = 0.5,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if inner_steps < 1:
            raise ValueError(f"inner_steps must be >= 1, got {inner_steps}")
        _check_adam({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        check_positive(step_size=step_size, max_grad_norm=max_grad_norm)
        if not 1 <= q <= 2:
            raise ValueError(f"q must be in [1, 2], got {q}")
        if anchor not in ("outputs", "parameters"):
            raise ValueError(f"anchor must be 'outputs' or 'parameters', got {anchor!r}")
        if anchor_interval is not None and anchor != "parameters":
            raise ValueError(f"anchor_interval={anchor_interval} needs anchor='parameters'")
        if anchor_interval is not None and anchor_interval < 1:
            raise ValueError(f"anchor_interval must be >= 1, got {anchor_interval}")
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, foreach=foreach, fused=fused)
        ours = {
            "inner_steps": inner_steps,
            "step_size": step_size,
            "q": q,
            "anchor": anchor,
            "anchor_interval": anchor_interval,
            "max_grad_norm": max_grad_norm,
        }
        self.defaults |= ours
        for group in self.param_groups:
            for key, value in ours.items():
                if group.setdefault(key, value) != value:
                    raise ValueError(f"{key} is shared by all parameter groups, got {group[key]!r} for one of them")
        self._run = _Run()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.gradients_cleared = True
        super().zero_grad(set_to_none)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_run", _Run())

    @property
    def divergence(self) -> Tensor | None:
        """B of the last :meth:`proximity`, a scalar without gradient; None before the first."""
        return self._run.divergence

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take ``inner_steps`` Adam steps from the anchor.

        Args:
            closure: zeroes the gradients, evaluates the loss, calls ``backward`` and returns the loss; called
                ``inner_steps`` times, with gradients enabled.

        Returns:
            The closure's first loss, the one at the anchor.
        """
        shared = self.param_groups[0]
        if shared["anchor"] == "parameters" and self._outer_steps() % (shared["anchor_interval"] or 1) == 0:
            self.refresh_anchor()
        if closure is None:
            if any(group["lr"] != 0 for group in self.param_groups):
                raise RuntimeError(
                    "MDPO evaluates its loss several times: call step(closure). A gradient scaler (Lightning's "
                    "precision '16-mixed') allows no closure; use 'bf16-mixed' or '32-true'"
                )
            _adam_step(self)  # what torch.distributed.checkpoint does to create the state
            return None
        first, run, evaluate = None, self._run, RepeatedClosure(self, closure)
        try:
            for run.inner_step in range(shared["inner_steps"]):
                run.calls = 0
                loss = evaluate()
                if run.inner_step == 0:
                    first = loss.detach() if isinstance(loss, Tensor) else loss
                params = [p for group in self.param_groups for p in group["params"]]
                # under DDP only the gradients are alike on all ranks, which must decide alike
                finite = loss is None or world_size() > 1 or bool(torch.as_tensor(loss).isfinite())
                if not (finite and gradients_are_finite(params)):
                    warn_of_skipped_step(self)
                    if run.inner_step == 0:
                        return first
                    break
                if shared["max_grad_norm"] is not None:
                    nn.utils.clip_grad_norm_(params, shared["max_grad_norm"], foreach=shared["foreach"])
                _adam_step(self)
        finally:
            run.anchors, run.inner_step = [], None
        outer_steps = self._outer_steps() + 1
        for p in self.state:
            if "exp_avg" in self.state[p]:  # Adam takes any other state for its own
                self.state[p]["outer_steps"] = outer_steps
        return first

    def _outer_steps(self) -> int:
        return max((state.get("outer_steps", 0) for state in self.state.values()), default=0)

    def proximity(
        self, policy: Distribution | Tensor, mask: Tensor | None = None, anchor: Distribution | Tensor | None = None
    ) -> Tensor:
        """``B(policy, anchor) / t_k``: to be added to the loss, inside of the closure.

        Args:
            policy: ``Normal``, ``Categorical``, ``Bernoulli``, ``MultivariateNormal``, one of them within
                ``Independent`` or behind a bijection (``TransformedDistribution``, which changes no divergence), or
                logits of categorical policies, ``(..., actions)``. May be called several times, for several policies.
            mask: which elements of the batch count, shaped like the batch, for example ``(batch, tokens)``.
            anchor: the policy at :meth:`anchor_parameters` on the same inputs; with ``anchor="parameters"`` only.

        Returns:
            Scalar: the divergence, summed over event dimensions, mean over the (unmasked) batch, over ``step_size``.
        """
        family, parameters, event_dims = _parse(policy)
        shared, run = self.param_groups[0], self._run
        if shared["anchor"] == "parameters":
            if anchor is None:
                raise ValueError(
                    "with anchor='parameters', proximity needs anchor=: the policy at anchor_parameters(module)"
                )
            anchor_parameters = tuple(p.detach() for p in _parse(anchor)[1])
        else:
            if anchor is not None:
                raise ValueError("anchor= is for anchor='parameters'; 'outputs' keeps the first evaluation by itself")
            if run.inner_step is None:
                raise RuntimeError(
                    "with anchor='outputs', proximity works inside of the closure that step calls; for gradient "
                    "accumulation use anchor='parameters'"
                )
            if run.inner_step == 0:
                run.anchors.append(tuple(p.detach().clone() for p in parameters))
                run.divergence = parameters[0].new_zeros(())
                return run.divergence  # at the anchor the divergence and its gradient are exactly zero
            if run.calls >= len(run.anchors):
                raise RuntimeError("the closure called proximity more often than in its first evaluation")
            anchor_parameters = run.anchors[run.calls]
            run.calls += 1
        shapes, expected = ([tuple(p.shape) for p in ps] for ps in (parameters, anchor_parameters))
        if shapes != expected:
            raise ValueError(
                f"the policy has parameters of shapes {shapes}, its anchor {expected}: all inner steps must see the "
                "same batch (for mini-batches use anchor='parameters')"
            )
        if mask is not None:
            batch = shapes[0][: len(shapes[0]) - event_dims - (family not in (Normal, Bernoulli))]
            if tuple(mask.shape) != batch:
                raise ValueError(f"mask must have the shape of the batch, {batch}, got {tuple(mask.shape)}")
            parameters, anchor_parameters = _masked(parameters, mask), _masked(anchor_parameters, mask)
        values = _bregman(family, parameters, anchor_parameters, shared["q"])
        values = values.sum(tuple(range(-event_dims, 0))) if event_dims else values
        divergence = values.mean() if mask is None else (values * mask).sum() / mask.sum().clamp(min=1)
        run.divergence = divergence.detach()
        return divergence / shared["step_size"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state.

        Raises:
            ValueError: the state is another optimizer's.
        """
        check_own_state(self, state_dict, {"step", "exp_avg", "exp_avg_sq", "anchor", "outer_steps"})
        super().load_state_dict(state_dict)

    def anchor_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Name -> anchor value of those parameters of ``module`` that this optimizer holds (``anchor="parameters"``).

        Evaluate under ``torch.no_grad()``: ``functional_call(module, optimizer.anchor_parameters(module), inputs)``.
        """
        if self.param_groups[0]["anchor"] != "parameters":
            raise RuntimeError("anchor_parameters needs anchor='parameters'")
        held = {p for group in self.param_groups for p in group["params"]}
        if any("anchor" not in self.state.get(p, {}) for p in held):
            self.refresh_anchor()
        return {name: self.state[p]["anchor"] for name, p in module.named_parameters() if p in held}

    @torch.no_grad()
    def refresh_anchor(self) -> None:
        """Make the current parameters the anchor (``anchor="parameters"``); ``step`` does it when due."""
        for group in self.param_groups:
            for p in group["params"]:
                if "anchor" in self.state[p]:
                    self.state[p]["anchor"].copy_(p)
                else:
                    self.state[p]["anchor"] = p.detach().clone(memory_format=torch.preserve_format)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what all groups share cannot differ."""
        for key in _SHARED:
            if key in self.defaults and param_group.get(key, self.defaults[key]) != self.defaults[key]:
                raise ValueError(f"{key} is shared by all parameter groups, got {param_group[key]!r} for one of them")
        super().add_param_group(param_group)
        try:
            _check_adam(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _init_group(self, group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Adam takes any entry in a parameter's state for its own: keep the anchor away from it."""
        anchors = {p: self.state[p].pop("anchor") for p in group["params"] if "anchor" in self.state.get(p, {})}
        result = super()._init_group(group, *args, **kwargs)
        for p, anchor in anchors.items():
            self.state[p]["anchor"] = anchor
        return result


class MDPOStepSize(LRScheduler):
    """Write t_k into ``step_size`` of the optimizer's groups; call ``step`` after each of the optimizer's.

    Learning rates are left alone, so another scheduler may change them.

    Args:
        optimizer: an :class:`MDPO`.
        schedule: "linear": ``t_0 (1 - k / total_steps)``; "constant"; "inverse_sqrt": ``t_0 / sqrt(k + 1)``; or a
            function from k to t_k, such as ``lambda k: 1 / (0.2 * (k + 2))`` for an entropy weight of 0.2. t_0 is the
            optimizer's ``step_size`` when the scheduler is built.
        total_steps: K, outer steps of the linear schedule, >= 1.
        floor: smallest t_k, > 0.
        offset: added to k in the linear schedule; -1 is what the authors' code does (from 1 + 1/K to 2/K).

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Literal["linear", "constant", "inverse_sqrt"] | Callable[[int], float] = "linear",
        total_steps: int | None = None,
        floor: float = 1e-3,
        offset: int = 0,
        last_epoch: int = -1,
    ) -> None:
        if not callable(schedule) and schedule not in ("linear", "constant", "inverse_sqrt"):
            raise ValueError(f"schedule must be 'linear', 'constant', 'inverse_sqrt' or a function, got {schedule!r}")
        if schedule == "linear" and (total_steps is None or total_steps < 1):
            raise ValueError(f"total_steps must be >= 1 for the linear schedule, got {total_steps}")
        check_positive(floor=floor)
        self.schedule = schedule
        self.total_steps = total_steps
        self.floor = floor
        self.offset = offset
        self.initial = optimizer.param_groups[0].setdefault("initial_step_size", optimizer.param_groups[0]["step_size"])
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates as they are."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Advance k and write t_k."""
        super().step(epoch)
        value = max(self.floor, self._value(self.last_epoch))
        for group in self.optimizer.param_groups:
            group["step_size"] = value

    def state_dict(self) -> dict[str, Any]:
        """The state, without the schedule."""
        return {key: value for key, value in super().state_dict().items() if key != "schedule"}

    def _value(self, k: int) -> float:
        if callable(self.schedule):
            return self.schedule(k)
        if self.schedule == "linear":
            assert self.total_steps is not None
            return self.initial * (1 - (k + self.offset) / self.total_steps)
        return self.initial if self.schedule == "constant" else self.initial * (k + 1) ** -0.5


def _check_adam(group: dict[str, Any]) -> None:
    """Validate Adam's hyperparameters, which torch takes also when they are infinite."""
    check_nonnegative(lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"])
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")


def _adam_step(optimizer: MDPO) -> None:
    """Adam's step without the hooks that torch puts around it: those belong to the whole of MDPO's step."""
    step: Any = Adam.step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)


def _parse(policy: Distribution | Tensor) -> tuple[type[Distribution], tuple[Tensor, ...], int]:
    """Family, parameters (at least float32) and the number of event dimensions to sum over."""
    if isinstance(policy, Independent):
        family, parameters, dims = _parse(policy.base_dist)
        return family, parameters, dims + policy.reinterpreted_batch_ndims
    if isinstance(policy, TransformedDistribution):
        return _parse(policy.base_dist)
    families: dict[type, tuple[type[Distribution], tuple[str, ...]]] = {
        Normal: (Normal, ("loc", "scale")),
        Categorical: (Categorical, ("logits",)),
        Bernoulli: (Bernoulli, ("logits",)),
        MultivariateNormal: (MultivariateNormal, ("loc", "scale_tril")),
    }
    if isinstance(policy, Tensor):
        return Categorical, (_widen(policy),), 0
    for kind, (family, names) in families.items():
        if isinstance(policy, kind):
            return family, tuple(_widen(getattr(policy, name)) for name in names), 0
    names_ = ", ".join(kind.__name__ for kind in families)
    raise TypeError(
        f"policy must be {names_}, one of them within Independent or TransformedDistribution, or a tensor of logits, "
        f"got {type(policy).__name__}"
    )


def _masked(parameters: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, ...]:
    """1 in place of what the mask drops, which may be NaN and would still be so after a product with 0."""
    return tuple(torch.where(mask.bool().view(*mask.shape, *[1] * (p.ndim - mask.ndim)), p, 1.0) for p in parameters)


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _bregman(family: type[Distribution], new: tuple[Tensor, ...], old: tuple[Tensor, ...], q: float) -> Tensor:
    """Divergence of each element of the batch (before event dimensions are summed)."""
    if family in (Categorical, Bernoulli):
        return _discrete_bregman(_log_probs(family, new[0]), _log_probs(family, old[0]), q)
    if q != 1:
        raise ValueError(f"q={q} is for categorical and Bernoulli policies; {family.__name__} has q=1 only")
    if family is Normal:
        (mean, std), (old_mean, old_std) = new, old
        ratio = std / old_std
        return 0.5 * (ratio.square() + ((mean - old_mean) / old_std).square() - 1) - ratio.log()
    return kl_divergence(*(MultivariateNormal(p[0], scale_tril=p[1], validate_args=False) for p in (new, old)))


def _log_probs(family: type[Distribution], logits: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, finite also for masked (-inf) logits."""
    if family is Bernoulli:
        logits = torch.stack([logits, torch.zeros_like(logits)], -1)
    return logits.clamp(min=torch.finfo(logits.dtype).min / 4).log_softmax(-1)


def _discrete_bregman(new: Tensor, old: Tensor, q: float) -> Tensor:
    if q == 1:
        return (new.exp() * (new - old)).sum(-1)
    p, anchor = new.exp(), (q * old).exp()
    return ((q * new).exp() - q * p * ((q - 1) * old).exp() + (q - 1) * anchor).sum(-1) / (q - 1)
