"""Who plays: the policy, the reference it stays near, and frozen copies of itself; as adapters or as whole models."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lit_methods.llm.language_model import LanguageModel
from lit_methods.llm.loading import Loading, add_adapters, load_causal_lm

Opponent = Literal["group", "policy", "reference", "mixture"]


@dataclass(frozen=True)
class Prox:
    """Nash Prox: the target is a moving average of the policy, or a copy that is renewed now and then.

    Attributes:
        kappa: share of the policy that enters the target after each optimizer step, in (0, 1].
        copy_every: copy the policy into the target every so many steps, 1 or more, instead of averaging.
        opponent: who the policy plays: its other samples of the same prompt (``"group"``: one set of responses serves
            as both players), separate samples of itself (``"policy"``) or of the reference (``"reference"``), or
            samples of the token-level geometric mixture of both (``"mixture"``).
        mixture: weight of the reference in the mixture, in (0, 1).

    Raises:
        ValueError: for a value outside its range.
    """

    kappa: float = 0.1
    copy_every: int | None = None
    opponent: Opponent = "group"
    mixture: float = 0.125

    def __post_init__(self) -> None:
        if not 0 < self.kappa <= 1:
            raise ValueError(f"kappa must be in (0, 1], got {self.kappa}")
        if self.copy_every is not None and self.copy_every < 1:
            raise ValueError(f"copy_every must be >= 1, got {self.copy_every}")
        if self.opponent not in Opponent.__args__:  # type: ignore[attr-defined]
            raise ValueError(f"opponent must be one of {Opponent.__args__}, got {self.opponent!r}")  # type: ignore[attr-defined]
        if not 0 < self.mixture < 1:
            raise ValueError(f"mixture must be in (0, 1), got {self.mixture}")


@dataclass(frozen=True)
class MirrorProx:
    """Nash-MP: a phase of steps against the target, then one against a frozen copy of what came out of it.

    Both phases are around the same target, which then becomes the policy.

    Attributes:
        inner_steps: optimizer steps per phase, 1 or more.

    Raises:
        ValueError: for a value outside its range.
    """

    inner_steps: int = 10

    def __post_init__(self) -> None:
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps must be >= 1, got {self.inner_steps}")


@dataclass(frozen=True)
class Reference:
    """The policy that the trained one stays near.

    Attributes:
        model: folder or hub id of a model of the same vocabulary, or of an adapter; default: the policy's start.
        dtype: storage type of weights of its own; default: that of the policy.
        offload: keep weights of its own on the CPU except while they score.
    """

    model: str | None = None
    dtype: str | None = None
    offload: bool = False


def build_players(
    lm: Any, lora: dict[str, Any] | None, names: list[str], reference: Reference, loading: Loading, wrap: Any
) -> tuple[LanguageModel, nn.ModuleDict]:
    """The policy, and the frozen players that have weights of their own.

    With LoRA the reference is the model with its adapters off, and the other frozen players are further adapters;
    without, they are copies.

    Args:
        lm: the loaded ``transformers`` model.
        lora: fields of ``peft.LoraConfig``; ``None`` for full fine-tuning.
        names: the frozen players besides the reference.
        reference: the reference.
        loading: how the reference is loaded, if it is another model.
        wrap: makes a :class:`~lit_methods.llm.language_model.LanguageModel` of a ``transformers`` model.
    """
    frozen = nn.ModuleDict()
    if reference.model is not None:
        frozen["reference"] = wrap(load_causal_lm(reference.model, loading))
    elif lora is None:
        frozen["reference"] = wrap(deepcopy(lm))
    if lora is None:
        lm.requires_grad_(True)
        frozen.update({name: wrap(deepcopy(lm)) for name in names})
    else:
        lm = add_adapters(lm, lora, names)
    frozen.requires_grad_(False)
    if reference.dtype is not None:
        frozen["reference"].to(getattr(torch, reference.dtype))
    return wrap(lm), frozen


@contextmanager
def acting(
    name: str, policy: LanguageModel, frozen: nn.ModuleDict, offloaded_to: torch.device | None
) -> Iterator[LanguageModel]:
    """The language model as one of the players; all but the policy only inside the context, without gradients.

    Args:
        name: the player.
        policy: the trained model, which holds the adapters of the others under LoRA.
        frozen: players with weights of their own.
        offloaded_to: device on which a player from the CPU acts; ``None`` for one that is where it acts.
    """
    if name == "policy":
        yield policy
        return
    if torch.is_grad_enabled():
        raise RuntimeError(f"player {name!r} is frozen: use it under torch.no_grad()")
    if name in frozen:
        model: Any = frozen[name]
        try:
            yield model if offloaded_to is None else model.to(offloaded_to)
        finally:
            if offloaded_to is not None:
                model.to("cpu")
        return
    lm: Any = policy.lm
    if name == "reference":
        with lm.disable_adapter():
            yield policy
        return
    lm.set_adapter(name, inference_mode=True)
    try:
        yield policy
    finally:
        lm.set_adapter("default")
