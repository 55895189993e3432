"""SSO: target-based surrogates for stochastic optimization.

Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based Surrogates for Stochastic Optimization", ICML 2023,
arXiv 2302.02607. The loss is l(f(θ)); z = f(θ_t) are the *targets* (logits, predictions, action means) and g_i is the
gradient of example i's loss with respect to its target. One gradient of the expensive l builds

    S_t(θ) = (1/n) Σ_i [ <g_i, f_i(θ) - z_i> + |f_i(θ) - z_i|² / (2 η_t) ],

which m inner steps minimise without l. For η <= 1/L, L the smoothness of l in the targets, mean loss + S_t bounds the
loss from above. Written from the paper's abstract and the authors' code; our η is half of that code's step size,
because its surrogate lacks the factor 1/2.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from lit_methods.optim.foundation.finite import warn_of_skipped_step
from lit_methods.optim.foundation.flat import is_dtensor
from lit_methods.optim.foundation.groups import (
    check_at_least,
    check_choice,
    check_keys,
    check_lr,
    check_nonnegative,
    check_own_state,
    check_positive,
    check_real,
)
from lit_methods.optim.foundation.ranks import world_size
from lit_methods.optim.sso.capture import CapturedCall, Circumstances, OutputCapture, reshard, unchanged_buffers
from lit_methods.optim.sso.former import MOVED, former_settings
from lit_methods.optim.sso.rules import Armijo, Newton, StepRule, step_rule
from lit_methods.optim.sso.solvers import InnerResult, InnerSolver, inner_solver
from lit_methods.optim.sso.surrogate import Divergence, TargetSurrogate, kl_divergence
from lit_methods.optim.sso.targets import Targets

__all__ = ["SSO"]

_SMOOTHNESS = {"mse": 2.0, "bce": 0.25, "ce": 0.5}
_DIVERGENCES: dict[str, Divergence | None] = {"euclidean": None, "kl": kl_divergence}
_ATTRIBUTES = (
    "_capture",
    "_target_module",
    "_settings",
    "_inner_optimizer",
    "_inner_saved",
    "_checked",
    "_forward_mode",
)


class _Settings(NamedTuple):
    """What all parameter groups share."""

    inner: InnerSolver
    rule: StepRule
    divergence: Divergence | None
    summed: bool
    num_batch_dims: int
    num_items: Callable[[Tensor], Any] | None
    max_target_grad_norm: float | None
    sign: float


TargetClosure = Callable[[], tuple[Tensor, Callable[[Tensor], Tensor]] | tuple[Tensor, Callable, Tensor]]


class SSO(Optimizer):
    r"""Minimise the loss through its surrogate in the space of the network's outputs.

    It sees the outputs in one of two ways.

    **Capture mode**, for an ordinary training step: give ``target_module``, the module whose output is the targets,
    and call ``step()`` after ``loss.backward()``, or ``step(closure)``. Hooks record the module's differentiable
    calls since the last step (several, and accumulation over mini-batches, are one big batch) and the gradients at
    its outputs. The inner steps run the module alone, on the recorded inputs, with the same dropout masks and
    autocast; running statistics keep what the recorded calls left in them. Parameters that influence the loss other
    than through the targets do not move by that. The loss has to be a mean over examples (or a sum: ``reduction``).

    **Target closure**, exact and for expensive losses::

        def closure():
            return model(x), loss_fn  # loss_fn maps targets to a scalar, and may hit a simulator

        loss = optimizer.step(closure)

    ``loss_fn`` is called once for each step (by the rule ``Armijo`` once more for each trial); the closure is called
    again at every inner step for the targets alone. Random numbers in it repeat themselves; for a network with
    running statistics give ``target_module`` too. A third item, the (batch,) int64 indices of the examples, is needed
    by the rule ``AdaGradPerExample``.

    One step costs a gradient of the loss plus m forward and backward passes of the network (``gauss_newton``: and m
    forward passes with tangents), so it pays where the loss, the simulation or the labels are dearer than m passes.
    Memory: three copies of the parameters during the step. Host synchronisations on CUDA: several for each inner step,
    for line searches and stopping rules decide on the host.

    A loss or gradient that is not finite skips the step, and the first such step warns. ``.grad`` is neither read nor
    changed, so gradient clipping has no effect; use ``max_target_grad_norm``. fp16 gradient scaling is refused: train
    in bfloat16.

    Several processes: S is the mean over all ranks' examples; under DDP the inner steps use the module without its
    wrapper and all-reduce gradients and every number on which a decision depends, once per inner step (less often
    with a solver's ``sync_every``). FSDP2: the capture of the root module works with every solver but
    ``ConjugateGradient``; the step lengths of ``GaussNewton`` come from central differences there, equal to those of
    forward-mode derivatives to about 1e-4 in float32; ``torch.distributed.checkpoint`` does not take this optimizer's
    state. FSDP1 is refused.

    Args:
        params: parameters, named parameters or groups. Groups may differ in ``weight_decay``. They share ``lr``, except
            that ``lr=0`` freezes a group.
        lr: η, the step in the space of the targets, >= 0; schedulers act on it. None: 1/L of ``loss``.
        loss: which loss it is, for ``lr=None`` and ``rule="newton"``: "mse" (squared error, summed over outputs: η =
            1/2), "bce" (with logits: 4) or "ce" (with logits: 2), averaged or summed over examples.
        target_module: the module whose calls are captured.
        target_fn: picks the targets from the module's output; None when it is one tensor.
        inner: how the surrogate is minimised: "gauss_newton", "cg", "lbfgs", "armijo", "adam" with their defaults, one
            of the solvers :class:`~lit_methods.optim.sso.GaussNewton`, ``ConjugateGradient``, ``StrongWolfeLBFGS``,
            ``ArmijoDescent`` and ``OptimizerSteps`` for m and the rest of their settings, or a function of the list of
            parameters that makes a torch optimizer, which keeps its state over steps.
        rule: η at each step: "constant", "sqrt", "armijo", "adagrad", "adagrad_per_example", "newton" with their
            defaults, or one of the rules :class:`~lit_methods.optim.sso.Constant`, ``Sqrt``, ``Exponential``,
            ``Armijo``, ``AdaGrad``, ``AdaGradPerExample`` and ``Newton``.
        divergence: "euclidean"; "kl" for targets that are probabilities (an exact minimiser then is exponentiated
            gradient); or a function of (f, z) that gives the entries of a Bregman divergence.
        reduction: whether the loss is the "mean" over examples or the "sum".
        num_batch_dims: leading dimensions of the targets that count examples, >= 1; 2 for (batch, time, vocabulary).
        num_items: for padded batches: maps the loss's gradient at the targets to the number of examples that count,
            or to a bool mask of the batch dimensions; what it masks is left out of the distance.
        weight_decay: adds (weight_decay / 2)|p|² to the objective, >= 0.
        max_target_grad_norm: greatest norm of one example's g_i, > 0; longer ones are shortened.
        process_group: the data-parallel ranks; None for all. Copies and unpickled instances use all.
        maximize: ascend instead of descend.

    Raises:
        ValueError: an argument out of range, or a ``target_module`` that lacks the parameters.
        RuntimeError: in :meth:`step`: nothing was captured; targets without a graph or ``loss_fn`` without a gradient;
            gradient scaling; sparse gradients; FSDP1.
        TypeError: in :meth:`step`: a closure's result of another form, a captured output that is not a tensor.
    """

    moved_arguments: ClassVar[dict[str, str]] = MOVED
    _step_supports_amp_scaling = True  # so that GradScaler announces itself and can be refused
    state: dict[Any, Any]  # type: ignore[assignment]  # η and the accumulators are no one parameter's: key "sso"

    @former_settings
    def __init__(
        self,
        params: ParamsT,
        lr: float | None = 1.0,
        loss: Literal["mse", "bce", "ce"] | None = None,
        *,
        target_module: nn.Module | None = None,
        target_fn: Callable[[Any], Tensor] | None = None,
        inner: str | InnerSolver | Callable[[list[Tensor]], Optimizer] = "gauss_newton",
        rule: str | StepRule = "constant",
        divergence: str | Divergence = "euclidean",
        reduction: Literal["mean", "sum"] = "mean",
        num_batch_dims: int = 1,
        num_items: Callable[[Tensor], Any] | None = None,
        weight_decay: float = 0.0,
        max_target_grad_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        maximize: bool = False,
    ) -> None:
        if lr is None and loss not in _SMOOTHNESS:
            raise ValueError(f"lr=None takes 1/L of loss, which must be one of {', '.join(_SMOOTHNESS)}, got {loss!r}")
        if loss is not None:
            check_choice("loss", loss, tuple(_SMOOTHNESS))
        if isinstance(divergence, str):
            check_choice("divergence", divergence, tuple(_DIVERGENCES))
        check_choice("reduction", reduction, ("mean", "sum"))
        check_at_least(1, num_batch_dims=num_batch_dims)
        check_positive(max_target_grad_norm=max_target_grad_norm)
        found_rule = step_rule(rule)
        if found_rule.euclidean_only and divergence != "euclidean":
            raise ValueError(f"divergence must be 'euclidean' with rule={rule!r}, got {divergence!r}")
        if isinstance(found_rule, Newton) and loss != "bce":
            raise ValueError(f"loss must be 'bce', whose Hessian is the metric, with rule={rule!r}, got {loss!r}")
        self._group = process_group
        self._settings = _Settings(
            inner=inner_solver(inner),
            rule=found_rule,
            divergence=_DIVERGENCES[divergence] if isinstance(divergence, str) else divergence,
            summed=reduction == "sum",
            num_batch_dims=num_batch_dims,
            num_items=num_items,
            max_target_grad_norm=max_target_grad_norm,
            sign=-1.0 if maximize else 1.0,
        )
        self._target_module: nn.Module | None = None
        self._capture: OutputCapture | None = None
        self._inner_optimizer: Optimizer | None = None
        self._inner_saved: dict[str, Any] | None = None
        self._checked = False
        self._forward_mode = True
        self._metrics: dict[str, float] = {}
        super().__init__(
            params,
            {"lr": 1 / _SMOOTHNESS[loss] if lr is None and loss is not None else lr, "weight_decay": weight_decay},
        )
        if target_module is not None:
            self.capture(target_module, target_fn)

    # ---- setting it up

    def capture(self, target_module: nn.Module, target_fn: Callable[[Any], Tensor] | None = None) -> None:
        """Record the calls of ``target_module`` from now on, as the constructor's arguments of these names do.

        A module is watched by one SSO at a time, the last.
        """
        if self._capture is not None:
            raise ValueError(f"target_module is given already: {type(self._target_module).__name__}")
        _check_contains(target_module, self._all_params)
        self._target_module = target_module
        self._capture = OutputCapture(target_module, target_fn)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have ``lr=0`` and a ``weight_decay`` of its own."""
        check_keys(param_group, self.defaults)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_lr(group["lr"])
            check_nonnegative(weight_decay=group["weight_decay"])
            check_real(group["params"])
            if getattr(self, "_target_module", None) is not None:
                _check_contains(self._target_module, group["params"])  # type: ignore[arg-type]
        except ValueError:
            self.param_groups.pop()
            raise
        if getattr(self, "_inner_optimizer", None) is not None:
            self._inner_optimizer.add_param_group({"params": group["params"]})  # type: ignore[union-attr]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _ATTRIBUTES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_group", None)
        self.__dict__.setdefault("_metrics", {})

    def state_dict(self) -> dict[str, Any]:
        """Step count, last η and inner step, accumulators, and the state of a lasting inner optimizer."""
        result = super().state_dict()
        inner = self._inner_saved if self._inner_optimizer is None else self._inner_optimizer.state_dict()
        if inner is not None and "sso" in self.state:
            result["state"] = {**result["state"], "sso": {**self.state["sso"], "inner": inner}}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the tensors are copied."""
        names = {"step", "eta", "inner_step_size", "inner", "sum", "table"}
        check_own_state(self, state_dict, names)
        super().load_state_dict(state_dict)
        own = dict(self.state.get("sso", {}))
        self._inner_optimizer, self._inner_saved = None, own.pop("inner", None)
        if own:
            self.state["sso"] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()}

    def get_metrics(self) -> dict[str, float]:
        """Of the last step that was taken: ``loss`` (target closure only), ``eta``, ``inner_steps``,
        ``inner_step_size``, ``surrogate_decrease`` and ``target_grad_norm`` (root mean square over examples)."""
        return dict(self._metrics)

    # ---- stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: returns (targets, loss_fn) or (targets, loss_fn, indices); or, in capture mode, computes the loss,
                calls backward and returns the loss.

        Returns:
            The loss before the step, or None in capture mode without a closure.
        """
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "SSO does not work with GradScaler, whose scaled gradients it cannot tell from real ones: use bfloat16 "
                "(precision='bf16-mixed' instead of '16-mixed'), which needs no scaling"
            )
        circumstances = Circumstances.now(self._device)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        lr = self._lr()
        if isinstance(result, tuple):
            if self._capture is not None:
                self._capture.pop_calls()
            return self._step_on_targets(closure, result, circumstances, lr)  # type: ignore[arg-type]
        calls = [] if self._capture is None else self._capture.pop_calls()
        if lr == 0 or (not calls and closure is not None and result is None):
            return result
        if not calls:
            self._explain_nothing_captured(closure is not None)
        self._step_on_calls(calls, lr)
        return result

    def _step_on_targets(
        self, closure: TargetClosure, result: tuple[Any, ...], circumstances: Circumstances, lr: float
    ) -> Tensor:
        if len(result) not in (2, 3) or not isinstance(result[0], Tensor) or not callable(result[1]):
            raise TypeError(
                "the closure must return (targets, loss_fn) or (targets, loss_fn, indices), a tensor and a function, "
                f"got ({', '.join(type(item).__name__ for item in result)})"
            )
        outputs, loss_fn, index = (*result, None)[:3]
        if not outputs.requires_grad:
            raise RuntimeError("the closure's targets have no graph: compute them from the parameters, without no_grad")
        z = outputs.detach()
        with torch.enable_grad():
            point = z.clone().requires_grad_()
            loss = loss_fn(point)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise RuntimeError(f"loss_fn must return a scalar tensor, got {shape}")
            if not loss.requires_grad:
                raise RuntimeError("loss_fn's result does not depend differentiably on the targets it was given")
            (slope,) = torch.autograd.grad(loss, point)
        loss = loss.detach()
        if lr == 0:
            return loss

        def forward() -> list[Tensor]:
            with circumstances.restored():
                return [closure()[0]]

        def loss_at(points: list[Tensor]) -> Tensor:
            return loss_fn(points[0].to(z.dtype))

        targets = self._targets([z], [slope], index)
        self._take_step(targets, forward, loss, loss_at, lr, outputs=[outputs])
        return loss

    def _step_on_calls(self, calls: list[CapturedCall], lr: float) -> None:
        rule, capture = self._settings.rule, self._capture
        assert capture is not None
        loss_fn = rule.loss_fn if isinstance(rule, Armijo) else None
        if isinstance(rule, Armijo) and (loss_fn is None or len(calls) > 1):
            raise RuntimeError(
                "the rule Armijo evaluates the loss at other targets: pass rule=Armijo(loss_fn=...), for steps with "
                "one call of the module, or call step with a closure that returns (targets, loss_fn)"
            )
        z, slopes = [call.output for call in calls], [call.slope for call in calls]
        targets = self._targets(z, slopes, None)  # type: ignore[arg-type]

        def loss_at(points: list[Tensor]) -> Tensor:
            assert loss_fn is not None
            return loss_fn(points[0].to(z[0].dtype))

        at_start = loss_at(targets.z) if isinstance(rule, Armijo) else None
        self._take_step(targets, lambda: capture.replay(calls), at_start, loss_at, lr)

    def _take_step(
        self,
        targets: Targets,
        forward: Callable[[], list[Tensor]],
        loss: Tensor | None,
        loss_at: Callable[[list[Tensor]], Tensor],
        lr: float,
        outputs: list[Tensor] | None = None,
    ) -> None:
        state = self.state.setdefault("sso", {"step": 0})
        numbers = targets.summary(loss)
        if not all(math.isfinite(number) for number in numbers):
            warn_of_skipped_step(self, "no example counts, or the loss or its gradient is not finite")
            return
        state["step"] += 1
        eta, metric = self._settings.rule.step_size(targets, loss, loss_at, lr, state)
        state["eta"] = eta
        active = [(p, g["weight_decay"]) for g in self.param_groups if g["lr"] for p in g["params"] if p.requires_grad]
        if any(getattr(p, "_fsdp_flattened", False) for p, _ in active):
            raise RuntimeError("SSO cannot see its parameters inside FSDP1; use FSDP2 (fully_shard) or DDP")
        surrogate = TargetSurrogate(
            forward,
            [p for p, _ in active],
            targets.z,
            targets.slopes,
            targets.count or 1.0,
            eta,
            metric=metric,
            divergence=self._settings.divergence,
            decay=[decay for _, decay in active],
            rank_weight=targets.rank_weight,
            group=targets.group,
            outputs=outputs,
            forward_mode=self._forward_mode,
        )
        paused = nullcontext() if self._capture is None else self._capture.pause()
        with unchanged_buffers(self._target_module), paused:
            result = self._minimise(surrogate)
        torch.clear_autocast_cache()
        reshard(self._target_module)
        self._forward_mode = surrogate.forward_mode or any(is_dtensor(p) for p in surrogate.params)
        state["inner_step_size"] = result.step_size
        self._check_replay(surrogate)
        self._metrics = {
            "eta": eta,
            "inner_steps": result.steps,
            "inner_step_size": result.step_size,
            "surrogate_decrease": result.before - result.after,
            "target_grad_norm": targets.rms_grad_norm,
        }
        if loss is not None:
            self._metrics["loss"] = numbers[0]

    def _minimise(self, surrogate: TargetSurrogate) -> InnerResult:
        solver, state = self._settings.inner, self.state["sso"]
        steps, every, lasting = solver.steps, solver.sync_every, self._lasting_inner()
        if surrogate.group is None or every == 1:
            return solver.solve(surrogate, steps, state, lasting)
        before, taken = None, 0
        for start in range(0, steps, every):
            with surrogate.alone():
                result = solver.solve(surrogate, min(every, steps - start), state, lasting)
            surrogate.average_parameters()
            before, taken = before if start else result.before, taken + result.steps
        numbers = torch.tensor([before, result.after, taken, result.step_size], dtype=torch.float64)
        before, after, taken, step_size = surrogate.mean_over_ranks([numbers.to(self._device)])[0].tolist()
        return InnerResult(before, after, round(taken), step_size)

    def _lasting_inner(self) -> Optimizer | None:
        if self._inner_optimizer is None:
            params, saved = self._all_params, self._inner_saved
            sizes = [len(params)] if saved is None else [len(group["params"]) for group in saved["param_groups"]]
            bounds = list(accumulate(sizes, initial=0))
            self._inner_optimizer = self._settings.inner.prepare([params[a:b] for a, b in pairwise(bounds)])
            if self._inner_optimizer is not None and saved is not None:
                self._inner_optimizer.load_state_dict(saved)
                if bounds[-1] < len(params):  # a group that was added after loading
                    self._inner_optimizer.add_param_group({"params": params[bounds[-1] :]})
                self._inner_saved = None
        return self._inner_optimizer

    # ---- targets and η

    def _targets(self, z: list[Tensor], slopes: list[Tensor], index: Tensor | None) -> Targets:
        settings = self._settings
        return Targets.of(
            z,
            [settings.sign * s for s in slopes],
            sign=settings.sign,
            summed=settings.summed,
            num_batch_dims=settings.num_batch_dims,
            num_items=settings.num_items,
            max_norm=settings.max_target_grad_norm,
            index=index,
            group=(self._group or dist.group.WORLD) if world_size(self._group) > 1 else None,
        )

    def _lr(self) -> float:
        rates = {float(group["lr"]) for group in self.param_groups} - {0.0}
        if len(rates) > 1:
            raise ValueError(f"lr is one step in the space of targets: groups may have it or 0, got {sorted(rates)}")
        return rates.pop() if rates else 0.0

    # ---- internals

    @property
    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _device(self) -> torch.device:
        return self._all_params[0].device

    def _check_replay(self, surrogate: TargetSurrogate) -> None:
        """Warn once when the captured calls cannot be repeated."""
        if self._checked or surrogate.first_outputs is None:
            return
        self._checked = True
        pairs = zip(surrogate.first_outputs, surrogate.targets, strict=True)
        gap = max(float((f - z).abs().max() / z.abs().max().clamp_min(1.0)) for f, z in pairs)
        if gap > 1e-2:
            warnings.warn(
                f"SSO cannot repeat the network's calls: its outputs at the same parameters differ by {gap:.2g} of "
                "their size. Does it change inputs or outputs in place, or depend on something that is not an input?",
                RuntimeWarning,
            )

    def _explain_nothing_captured(self, called: bool) -> None:
        if self._capture is None:
            given = "the closure returned no (targets, loss_fn)" if called else "step was called without a closure"
            raise RuntimeError(
                f"SSO needs the targets: {given} and there is no target_module. Pass target_module=<the module whose "
                "output is the targets> and call loss.backward() before step(), or return (targets, loss_fn)"
            )
        raise RuntimeError(
            f"SSO captured no gradient at the output of {type(self._target_module).__name__}: call it with gradients "
            "enabled, use its very output in the loss, and call loss.backward() before step()"
        )


def _check_contains(module: nn.Module, params: list[Tensor]) -> None:
    inside = {id(p) for p in module.parameters()}
    missing = sum(id(p) not in inside for p in params)
    if missing:
        raise ValueError(
            f"target_module={type(module).__name__} lacks {missing} of the optimized parameters, which SSO could not "
            "train: give the module that maps inputs to targets, or fewer parameters"
        )
