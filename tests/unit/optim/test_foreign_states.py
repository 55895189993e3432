"""An optimizer refuses the state of another kind of optimizer."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from lit_methods.optim import MDPO, MFAC, ExponentiatedGradient, ScaledGD

OURS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (ExponentiatedGradient, {"lr": 0.1, "momentum": 0.9}),
    (MFAC, {"lr": 0.1, "num_grads": 2, "damping": 0.1, "momentum": 0.9}),
    (MDPO, {"lr": 0.1}),
    (ScaledGD, {"lr": 0.1, "damping": None}),
]


def state_of(optimizer: type[Optimizer], schedule: bool = False, **arguments: Any) -> tuple[Optimizer, dict[str, Any]]:
    """An optimizer after one step, and its state."""
    p = nn.Parameter(torch.ones(3))
    made = optimizer([p], **arguments)
    if schedule:
        OneCycleLR(made, 0.1, total_steps=5, cycle_momentum=False)

    def closure() -> torch.Tensor:
        made.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    made.step(closure)
    return made, made.state_dict()


@pytest.mark.parametrize(("kind", "arguments"), OURS)
def test_foreign_states_are_refused_and_own_ones_load(kind: type[Optimizer], arguments: dict[str, Any]) -> None:
    optimizer, own = state_of(kind, **arguments)
    optimizer.load_state_dict(state_of(kind, schedule=True, **arguments)[1])  # a schedule's settings are not foreign
    optimizer.load_state_dict(own)
    _, theirs = state_of(torch.optim.RMSprop, lr=0.1)
    for foreign, names in [
        ({**own, "param_groups": theirs["param_groups"]}, "'alpha'"),
        ({**own, "state": theirs["state"]}, "'square_avg'"),
    ]:
        before = optimizer.state_dict()
        with pytest.raises(ValueError, match=f"the state is not of {kind.__name__}, which does not know.*{names}"):
            optimizer.load_state_dict(foreign)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
