"""SSO's arguments of version 0.0, for one release: they warn and become a solver or a rule."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lit_methods.optim.sso import rules, solvers

Init = TypeVar("Init", bound=Callable[..., None])

_SOLVER_FIELDS = {
    "inner_steps": "steps", "inner_tol": "tol", "inner_armijo_c": "armijo_c", "inner_grow": "grow", "inner_lr": "lr",
    "sync_every": "sync_every",
}  # fmt: skip
_RULE_FIELDS = {
    "armijo_c": "c", "armijo_decay": "decay", "armijo_grow": "grow", "eta_bounds": "bounds",
    "adagrad_bounds": "bounds", "newton_damping": "damping", "loss_fn": "loss_fn", "total_steps": "total_steps",
}  # fmt: skip
MOVED = {name: f"{field} of inner" for name, field in _SOLVER_FIELDS.items()}
MOVED |= {name: f"{field} of rule" for name, field in _RULE_FIELDS.items()}
_RULES = {
    "armijo": (rules.Armijo, {"armijo_c", "armijo_decay", "armijo_grow", "eta_bounds", "loss_fn"}),
    "adagrad_diag": (rules.AdaGradPerExample, {"adagrad_bounds"}),
    "newton": (rules.Newton, {"newton_damping"}),
    "exponential": (rules.Exponential, {"total_steps"}),
}


def former_settings(init: Init) -> Init:
    """Let ``init`` take the former keyword arguments too."""

    @functools.wraps(init)
    def taking_former(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {name for name in kwargs if name in _SOLVER_FIELDS or name in _RULE_FIELDS}
        if given or kwargs.get("inner") == "sgd" or kwargs.get("rule") == "adagrad_diag":
            kwargs = _translated(kwargs)
            warnings.warn(
                f"SSO's {', '.join(sorted(given)) or 'spelling'} will go: write inner={kwargs['inner']}, "
                f"rule={kwargs['rule']}",
                FutureWarning,
            )
        init(self, *args, **kwargs)

    return taking_former  # type: ignore[return-value]


def _translated(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = dict(kwargs)
    settings = {_SOLVER_FIELDS[name]: kwargs.pop(name) for name in _SOLVER_FIELDS if name in kwargs}
    rule_settings = {name: kwargs.pop(name) for name in _RULE_FIELDS if name in kwargs}
    inner, rule = kwargs.get("inner", "gauss_newton"), kwargs.get("rule", "constant")
    lr = settings.get("lr")
    if inner in ("adam", "sgd"):
        if inner == "sgd" and lr is None:
            raise ValueError("inner_lr must be given for inner='sgd', got None")
        kind = torch.optim.Adam if inner == "adam" else torch.optim.SGD
        inner = functools.partial(kind, lr=1e-3 if lr is None else lr)
    solver = solvers.inner_solver(inner)
    known = {name: value for name, value in settings.items() if hasattr(solver, name) and value is not None}
    kwargs["inner"] = dataclasses.replace(solver, **known)
    if rule in _RULES and not (rule == "exponential" and "total_steps" not in rule_settings):
        make, names = _RULES[rule]
        rule = make(**{_RULE_FIELDS[name]: value for name, value in rule_settings.items() if name in names})
    kwargs["rule"] = rule
    return kwargs
